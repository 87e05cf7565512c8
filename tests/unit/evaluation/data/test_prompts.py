"""Prompts from files, and clear errors for files that have none."""

from pathlib import Path

import pytest

from layerskip.errors import InvalidArgumentError
from layerskip.evaluation.data.prompts import read_prompts


def test_a_text_file_is_one_prompt(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("def f():\n    pass\n")
    assert read_prompts(file) == ["def f():\n    pass\n"]


def test_json_lines_with_a_named_field_and_a_limit(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a", "q": "x"}\n\n{"prompt": "b", "q": "y"}\n{"prompt": "c", "q": "z"}\n')
    assert read_prompts(file) == ["a", "b", "c"]
    assert read_prompts(file, field="q", limit=2) == ["x", "y"]


@pytest.mark.parametrize(
    ("content", "name", "field", "message"),
    [
        ('{"a": "x"}\n', "a.jsonl", None, r"line 1 has no field 'prompt'; it has 'a'"),
        ('{"a": "x"}\nnonsense\n', "a.jsonl", "a", r"line 2 is not JSON"),
        ('{"a": 3}\n', "a.jsonl", "a", r"must be a text"),
        ("[1]\n", "a.jsonl", "a", r"has no field 'a'; it has a list"),
        ("  \n", "a.jsonl", "a", r"is empty"),
        ("text", "a.txt", "a", r"needs a .jsonl file"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, name: str, field: str | None, message: str) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(InvalidArgumentError, match=message):
        read_prompts(file, field=field)


def test_missing_and_binary_files_and_bad_limits(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"is not UTF-8|can't be read"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidArgumentError, match=r"is not UTF-8|can't be read"):
        read_prompts(tmp_path / "b.txt")
    (tmp_path / "c.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(InvalidArgumentError, match="limit"):
        read_prompts(tmp_path / "c.jsonl", limit=0)
