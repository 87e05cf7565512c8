"""Texts to train exit adapters for SmolLM2 on: beginnings that it continues, what it wrote, and Python sources.

    python texts.py begin --output beginnings.jsonl --count 4000
    layerskip batch --input beginnings.jsonl ...
    python texts.py join --results results.jsonl --output written.jsonl
    python texts.py ask --questions gsm8k_train.jsonl --output questions.jsonl
    python texts.py code --output code.jsonl

After its own chat template up to where a question begins, an instruction-tuned model writes a question, and then the
answer (arXiv:2406.08464). A few first words lead to questions of different kinds.
"""

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from layerskip.checkpoint.checkpoint import open_checkpoint

MODEL = "smollm2"
FIRST_WORDS = (
    "Write a Python function that",
    "Write a Python function to",
    "Complete this Python function:\n\n```python\ndef",
    "from typing import List\n\n\ndef",
    "from typing import List\n\n\ndef",
    "def ",
    "Explain what",
    "Explain how",
    "What is",
    "Why do",
    "How does",
    "Give me",
    "Write a short story about",
    "Write an email",
    "List",
    "Compare",
    "If a store sells",
    "A farmer has",
    "Tom has",
    "Sarah",
    "John",
    "How many",
    "Mary buys",
    "Can you",
    "",
    "",
    "Describe",
    "James",
    "A bakery",
    "There are",
)


@dataclass(frozen=True, kw_only=True)
class Begin:
    """Write prompts that end where a question begins."""

    output: Path
    count: int = 4000

    def run(self) -> None:
        tokenizer = open_checkpoint(MODEL).tokenizer
        frame = tokenizer.apply_chat_template([{"role": "user", "content": "\x00"}], tokenize=False)
        before = str(frame).split("\x00")[0]
        words = (FIRST_WORDS[i % len(FIRST_WORDS)] for i in range(self.count))
        write(self.output, [{"prompt": before + first} for first in words])


@dataclass(frozen=True, kw_only=True)
class Join:
    """Join prompts with what was written after them, special tokens included."""

    results: Path
    output: Path

    def run(self) -> None:
        tokenizer = open_checkpoint(MODEL).tokenizer
        records = map(json.loads, self.results.read_text(encoding="utf-8").splitlines())
        texts = [r["prompt"] + str(tokenizer.decode(r["token_ids"])) for r in records if "token_ids" in r]
        write(self.output, [{"text": text} for text in texts])


@dataclass(frozen=True, kw_only=True)
class Ask:
    """Ask each question several times: sampled answers differ."""

    questions: Path
    output: Path
    field: str = "question"
    times: int = 3
    limit: int | None = None
    """Questions to take from the beginning; all if not given."""

    def run(self) -> None:
        lines = self.questions.read_text(encoding="utf-8").splitlines()[: self.limit]
        asked = [[{"role": "user", "content": json.loads(line)[self.field]}] for line in lines]
        write(self.output, [{"prompt": messages} for messages in asked * self.times])


@dataclass(frozen=True, kw_only=True)
class Code:
    """Take some of the Python standard library's sources."""

    output: Path
    characters: int = 1_000_000

    def run(self) -> None:
        files = sorted(path for path in Path(os.__file__).parent.glob("*.py") if path.stat().st_size < 30_000)
        random.Random(3).shuffle(files)
        texts: list[str] = []
        for path in files:
            if sum(map(len, texts)) < self.characters:
                texts.append(path.read_text(encoding="utf-8", errors="ignore"))
        write(self.output, [{"text": text} for text in texts])


def write(path: Path, records: list[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    print(f"{len(records)} texts in {path}")


Command = (
    Annotated[Begin, tyro.conf.subcommand("begin")]
    | Annotated[Join, tyro.conf.subcommand("join")]
    | Annotated[Ask, tyro.conf.subcommand("ask")]
    | Annotated[Code, tyro.conf.subcommand("code")]
)

if __name__ == "__main__":
    tyro.cli(Command, description=__doc__).run()  # type: ignore[arg-type]
