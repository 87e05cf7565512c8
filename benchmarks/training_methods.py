"""Four ways to let the early layers of a published model draft, with the same training tokens: a table and a plot.

    python benchmarks/training_methods.py --data chats.jsonl --questions questions.jsonl --skip 400
    python benchmarks/training_methods.py --data chats.jsonl --questions questions.jsonl --docs docs --max-steps 200

Bare exits of the model as it is; the paper's recipe on all weights; the recipe through LoRA; and exit adapters on the
frozen model. All see the same blocks in the same order. Measured are the agreement of early exits with the last layer
on held-out data, while training and at the end; the loss of the last layer before and after; accepted drafts on
questions in the chat template; and the speed against the same model's autoregressive decoding in the same process. Runs
that are done are not repeated, and one that was stopped goes on.
"""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import tyro
from record import write_record

import layerskip
from layerskip.evaluation.data.prompts import read_prompts

METHODS = ("bare exits", "recipe, all weights", "recipe, LoRA", "exit adapters")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark."""

    data: tuple[str, ...]
    """Data to train on."""
    questions: Path
    """JSON lines with questions that aren't trained on."""
    field: str = "question"
    skip: int = 0
    """Questions to leave out at the beginning."""
    num_prompts: int = 8
    max_new_tokens: int = 96
    model: str = "smollm2"
    exits: tuple[int, ...] = (2, 8)
    """Exits that draft, and whose agreement is shown."""
    num_speculations: int = 2
    folder: Path = Path("runs/training_methods")
    max_steps: int = 100
    batch_size: int = 4
    sequence_length: int = 256
    lora_rank: int = 16
    docs: Path | None = None
    """Folder for the plot training_methods.png."""


def train(arguments: Arguments, method: str) -> dict[str, Any]:
    """Train by one method, or read the results of an earlier training; returns its numbers, curve included."""
    output = arguments.folder / method.replace(",", "").replace(" ", "_")
    changes: dict[str, Any] = {"recipe": layerskip.LayerSkipConfig(exit_loss="kl", exit_layers=arguments.exits)}
    start: dict[str, Any] = {"model": arguments.model}
    match method:
        case "bare exits":
            return {}
        case "exit adapters":
            changes = {"adapters": layerskip.ExitAdapterConfig(exit_adapters=arguments.exits)}
        case "recipe, LoRA":
            start["lora_rank"] = arguments.lora_rank
    config = layerskip.TrainingConfig(
        start=layerskip.StartConfig(**start),
        data=layerskip.DataConfig(
            data=arguments.data, sequence_length=arguments.sequence_length, held_out=0.03, eval_tokens=8192
        ),
        optimization=layerskip.OptimizationConfig(max_steps=arguments.max_steps, batch_size=arguments.batch_size),
        checkpoints=layerskip.CheckpointConfig(
            save_steps=max(1, arguments.max_steps // 2), eval_steps=max(1, arguments.max_steps // 4), keep=1
        ),
        **changes,
    )
    result = layerskip.train(config, output, resume=(output / "training.toml").exists())
    return {
        "folder": str(output),
        "tokens": result.num_tokens,
        "seconds": result.seconds,
        "loss": result.loss,
        "agreement": {quality.exit_layer: quality.agreement for quality in result.exits},
        "curve": read_curve(output, arguments),
    }


def read_curve(output: Path, arguments: Arguments) -> list[dict[str, float]]:
    """Agreement at the first exit, by training tokens."""
    per_step, curve = arguments.batch_size * arguments.sequence_length, []
    for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        for kind in ("exit", "adapter"):
            name = f"eval_{kind}_{arguments.exits[0]}_agreement"
            if name in entry:
                curve.append({"tokens": entry["step"] * per_step, "agreement": entry[name]})
    return curve


def measure_base(arguments: Arguments) -> dict[str, Any]:
    """Agreement of bare exits, and the loss of the last layer, on the held-out data that training evaluates on."""
    from layerskip.training.data.corpus import load_corpus
    from layerskip.training.data.packing import IGNORED

    lm = layerskip.load(arguments.model, exit_adapters=None, dtype="float32", device="cpu")
    data = layerskip.DataConfig(
        data=arguments.data, sequence_length=arguments.sequence_length, held_out=0.03, eval_tokens=8192
    )
    agreed, loss, count = dict.fromkeys(arguments.exits, 0), 0.0, 0
    for block in load_corpus(data, lm.tokenizer).held_out:
        positions = block.get("position_ids", torch.arange(arguments.sequence_length))
        starts = [*(positions == 0).nonzero().flatten().tolist(), arguments.sequence_length]
        for start, stop in pairwise(starts):
            ids, wanted = block["input_ids"][start:stop], block["labels"][start + 1 : stop]
            places = (wanted != IGNORED).nonzero().flatten()
            if not len(places):
                continue
            last = lm.logits(ids.tolist())[places]
            loss += torch.nn.functional.cross_entropy(last, wanted[places], reduction="sum").item()
            count += len(places)
            for exit_layer in arguments.exits:
                early = lm.logits(ids.tolist(), exit_layer=exit_layer)[places]
                agreed[exit_layer] += int((early.argmax(-1) == last.argmax(-1)).sum())
    return {"loss": loss / count, "agreement": {exit_layer: found / count for exit_layer, found in agreed.items()}}


def measure_drafts(arguments: Arguments, method: str, folder: str | None) -> dict[int, dict[str, float]]:
    """Accepted drafts and speed by exit, on the questions."""
    adapters = folder if method == "exit adapters" else None
    model = arguments.model if folder is None or adapters is not None else folder
    lm = layerskip.load(model, exit_adapters=adapters, dtype="float32", device="cpu")
    texts = read_prompts(arguments.questions, field=arguments.field, limit=None)[arguments.skip :]
    prompts = [lm.encode_chat([{"role": "user", "content": text}]) for text in texts[: arguments.num_prompts]]
    ways: list[dict[str, Any]] = [{"generation_strategy": "autoregressive"}]
    ways += [{"exit_layer": exit_, "num_speculations": arguments.num_speculations} for exit_ in arguments.exits]
    seconds, tokens, rounds, first = ([0.0] * len(ways), [0] * len(ways), [0] * len(ways), [[0, 0] for _ in ways])
    for prompt in (prompts[0], *prompts):
        for place, way in enumerate(ways):
            (result,) = lm.generate([prompt], max_new_tokens=arguments.max_new_tokens, **way)
            stats = result.stats
            seconds[place] += stats.seconds - stats.time_to_first_token_s
            tokens[place] += stats.tokens - 1
            rounds[place] += stats.rounds
            first[place][0] += sum(stats.accepted_by_position[:1])
            first[place][1] += sum(stats.drafted_by_position[:1])
    plain = tokens[0] / seconds[0]
    return {
        exit_layer: {
            "first_accepted": first[place][0] / max(1, first[place][1]),
            "tokens_a_round": tokens[place] / max(1, rounds[place]),
            "speedup": tokens[place] / seconds[place] / plain,
        }
        for place, exit_layer in enumerate(arguments.exits, 1)
    }


def make_table(arguments: Arguments, found: dict[str, dict[str, Any]]) -> str:
    """The table in Markdown."""
    base = found["bare exits"]["loss"]
    lines = [
        "| method | exit | training tokens/s | loss, last layer | agreement | first drafts accepted | tokens a round "
        f"(K = {arguments.num_speculations}) | speed, autoregressive = 1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, numbers in found.items():
        loss = base if numbers.get("loss") is None else numbers["loss"]
        speed = f"{numbers['tokens'] / numbers['seconds']:.0f}" if numbers.get("seconds") else "-"
        for exit_layer in arguments.exits:
            drafts = numbers["drafts"][exit_layer]
            lines.append(
                f"| {method} | {exit_layer} | {speed} | {loss:.3f} | {numbers['agreement'][exit_layer]:.1%} | "
                f"{drafts['first_accepted']:.1%} | {drafts['tokens_a_round']:.2f} | {drafts['speedup']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def draw(arguments: Arguments, found: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot the agreement of the first exit over training tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    begins = found["bare exits"]["agreement"][arguments.exits[0]]
    for method, numbers in found.items():
        end = arguments.max_steps * arguments.batch_size * arguments.sequence_length
        curve = numbers.get("curve") or [{"tokens": end, "agreement": begins}]
        tokens, agreement = ([point[name] for point in curve] for name in ("tokens", "agreement"))
        axes.plot([0, *tokens], [begins, *agreement], "o-", ms=3, label=method)
    axes.set(xlabel="training tokens", ylabel=f"agreement at exit {arguments.exits[0]}", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main(arguments: Arguments) -> None:
    """Train, measure, print and record."""
    found: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        numbers = train(arguments, method) or measure_base(arguments)
        numbers["drafts"] = measure_drafts(arguments, method, numbers.get("folder"))
        found[method] = numbers
        print(f"{method}: {numbers}", flush=True)
    print(make_table(arguments, found))
    print(write_record("training_methods", {"max_steps": arguments.max_steps, "methods": found}))
    if arguments.docs is not None:
        draw(arguments, found, arguments.docs / "training_methods.png")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
