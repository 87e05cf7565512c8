"""A tokenizer and helpers that the tests of data share."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SENTENCES = [f"the {a} {b} sees {c} boats. " for a in ("old", "new") for b in ("cat", "man") for c in ("two", "nine")]


@pytest.fixture(scope="session")
def trained_tokenizer() -> "PreTrainedTokenizerFast":
    from layerskip.training.data.tokenizer import train_tokenizer

    return train_tokenizer(SENTENCES * 4, 320)


@pytest.fixture
def tokenizer(trained_tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedTokenizerFast":
    """`<s>` 0, `</s>` 1, `<pad>` 2; a copy, whose chat template a test may set."""
    from copy import deepcopy

    return deepcopy(trained_tokenizer)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Any:
    """Writes records into a .jsonl file and returns its path."""

    def write(*records: object, name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
        return str(path)

    return write


@pytest.fixture
def many_texts(tmp_path: Path) -> str:
    """A folder of sixty different short texts, of which some are held out at a share of 0.2."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02}.txt").write_text(f"Text {number}: " + SENTENCES[number % 8] * (1 + number % 5) + "\n")
    return str(folder)
