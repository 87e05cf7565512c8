"""Halves of characters (lone surrogates), which JSON and other programs can spell: one line that says where."""

from collections.abc import Callable
from pathlib import Path

import pytest

TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
HALF = r"\ud83d"
"""As JSON spells it."""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("generate", "--prompt", "a\ud83d"), "the text of --prompt is not UTF-8"),
        (("generate", "--prompt", "bytes: \udcff"), "the text of --prompt is not UTF-8"),
        (("generate", "--prompt", "a", "--stop", "\ud83d"), "stop '\\ud83d' has half a character"),
        (("chat", "--system", "a\ud83d"), "the text of --system is not UTF-8"),
    ],
    ids=ascii,
)
def test_on_the_command_line(cli: Callable, argv: tuple[str, ...], message: str) -> None:
    outcome = cli(*argv)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert message in outcome.err


def test_in_a_file_of_prompts(cli: Callable, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "fine"}}\n{{"prompt": "ab{HALF}c"}}\n')
    outcome = cli("verify", "--prompts", str(file), "--max-new-tokens", "4", "--exit-layers", "4")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert f"prompt 1 has half a character, '{HALF}', at position 2" in outcome.err


def test_in_a_batch_the_other_lines_are_written(cli: Callable, tmp_path: Path) -> None:
    file, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    chat = f'[{{"role": "user", "content": "{HALF}"}}]'
    file.write_text(f'{{"prompt": "x = 1"}}\n{{"prompt": "ab{HALF}"}}\n{{"prompt": {chat}}}\n')
    outcome = cli("batch", "--input", str(file), "--output-file", str(output), "--max-new-tokens", "4")
    assert outcome.code == 1, outcome.err
    written = output.read_text().splitlines()
    assert ["half a character" in line for line in written] == [False, True, True]
