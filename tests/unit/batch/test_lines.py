"""Lines of a batch: what is read, and what a bad line says."""

from pathlib import Path

import pytest

from layerskip.batch.lines import read_lines
from layerskip.errors import InvalidArgumentError


def test_lines_have_their_place_and_their_id(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    text = "a\u2028b"  # a line end to some, and none in JSON lines
    file.write_text(f'\ufeff{{"text": "{text}", "id": [1]}}\r\n\n   \n{{"text": "c", "other": 2}}', encoding="utf-8")
    lines, digest = read_lines(file, "text")
    assert [line.fields for line in lines] == [{"index": 0, "id": [1], "prompt": text}, {"index": 1, "prompt": "c"}]
    assert [line.error for line in lines] == [None, None]
    file.write_text('{"text": "d"}')
    assert read_lines(file, "text")[1] != digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ('"abc"', "must be a JSON object, got a str"),
        ('{"text": "abc"}', "has no field 'prompt'; it has 'text'"),
        ('{"prompt": 3}', "got a int"),
        ('{"prompt": ["a"]}', "got a list"),
        ('{"prompt": [{"role": "user"}]}', "got a list"),
        ('{"prompt": ""}', "is empty"),
        ('{"prompt": []}', "is empty"),
        ('{"prompt": "\\ud83d"}', "spells half a character"),
    ],
)
def test_a_bad_line_says_what_is_wrong_and_the_others_stay(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(f'{{"prompt": "good"}}\n{text}\n')
    good, bad = read_lines(file)[0]
    assert good.error is None
    assert bad.error is not None
    assert bad.error.startswith("prompt 1 ")
    assert message in bad.error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n \n", "has no lines"),
        (b"\xff", "is not UTF-8"),
        (b'{"text": "a"}\n{"text": "b"}', "name the prompt's field"),
    ],
)
def test_a_file_without_prompts_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_bytes(content)
    with pytest.raises(InvalidArgumentError, match=message):
        read_lines(file)
    with pytest.raises(InvalidArgumentError, match="can't be read"):
        read_lines(tmp_path / "missing.jsonl")
