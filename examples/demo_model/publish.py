r"""Measure a trained model and its plain twin, and make the model the embedded one, with a model card.

    python publish.py --parts runs/model_scratch runs/model_distilled --run runs/model --twin runs/twin \
        --prompts human_eval.jsonl

Acceptance and speed are measured with greedy decoding of the prompts (JSON lines with a field `prompt`), exit L/4 and
four drafts. Autoregressive and self-speculative decoding alternate, prompt by prompt, and must generate the same
tokens.
"""

import json
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

import layerskip
from layerskip.evaluation.data.prompts import read_prompts

DEMO = Path(layerskip.__file__).parent / "assets" / "demo"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
NUM_SPECULATIONS = 4
MOST_BYTES = 32_000_000


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the script."""

    parts: tuple[Path, ...]
    """Runs of the earlier parts."""
    run: Path
    """Run of the last part, whose model is published."""
    twin: Path
    prompts: Path
    limit: int = 164
    """Most prompts to decode."""
    max_new_tokens: int = 96
    threads: int = 2
    install: bool = True
    """Replace the embedded model; without it, only measure."""


def decode(arguments: Arguments) -> dict[str, Any]:
    """Acceptance and speed of greedy self-speculative decoding."""
    lm = layerskip.load(str(arguments.run))
    exit_layer = lm.decoder.num_layers // 4
    plain = {"max_new_tokens": arguments.max_new_tokens, "generation_strategy": "autoregressive"}
    drafting = {
        "max_new_tokens": arguments.max_new_tokens,
        "generation_strategy": "self_speculative",
        "exit_layer": exit_layer,
        "num_speculations": NUM_SPECULATIONS,
    }
    accepted = drafted = 0
    ratios = []
    prompts = read_prompts(arguments.prompts, field="prompt", limit=arguments.limit)
    for index, prompt in enumerate(prompts):
        order = (plain, drafting) if index % 2 else (drafting, plain)
        results = {id(options): lm.generate([prompt], **options)[0] for options in order}
        one, two = results[id(plain)], results[id(drafting)]
        assert one.token_ids == two.token_ids, f"prompt {index}: the texts differ"
        accepted += two.stats.accepted
        drafted += two.stats.drafted
        ratios.append(two.stats.tokens_per_second / one.stats.tokens_per_second)
    stripped = lm.generate([prompt.rstrip() for prompt in prompts], **drafting)
    return {
        "exit_layer": exit_layer,
        "num_prompts": len(ratios),
        "acceptance": accepted / drafted,
        "acceptance_stripped": sum(r.stats.accepted for r in stripped) / sum(r.stats.drafted for r in stripped),
        "speedup": statistics.median(ratios),
    }


def describe(folder: Path) -> str:
    """One part of the training: tokens and recipe."""
    run = json.loads((folder / "training.json").read_text())
    recipe = json.loads((folder / "config.json").read_text())["layerskip"]
    named = recipe.get("exit_layers") or []
    exits = f"at exit{'s' if len(named) > 1 else ''} {' and '.join(map(str, named))} " if named else ""
    rotation = f", R = {recipe['rotation']}" if recipe["curriculum"] == "rotational" else ""
    return (
        f"{run['step']} steps, {run['num_tokens'] / 1e6:.1f}M tokens with the exit loss `{recipe['exit_loss']}` {exits}"
        f"({recipe['exit_weights']} weights, scale {recipe['exit_loss_scale']}, {recipe['curriculum']} curriculum"
        f"{rotation}) and {recipe['dropout_schedule']} layer dropout up to {recipe['dropout_max']}"
    )


def card(arguments: Arguments, decoded: dict[str, Any]) -> str:
    """The model card."""
    run, twin = (json.loads((folder / "training.json").read_text()) for folder in (arguments.run, arguments.twin))
    config = json.loads((arguments.run / "config.json").read_text())
    by_layer = {quality["exit_layer"]: quality for quality in run["exits"]}
    rows = "\n".join(
        f"| {layer} | {quality['loss']:.3f} | {quality['agreement']:.1%} |" for layer, quality in by_layer.items()
    )
    lm = layerskip.load(str(arguments.run))
    return f"""# The embedded model
A Llama of {config["num_hidden_layers"]} layers, width {config["hidden_size"]}, vocabulary {config["vocab_size"]} \
(byte-level BPE), {lm.checkpoint.num_parameters / 1e6:.1f}M parameters, {config["dtype"]}, \
trained by `layerskip train` from the settings in `examples/demo_model`: from scratch, then continued twice.
Made for tests, timing and demonstrations, not for its prose: it writes what looks like Python.

- **Data**: the sources of CPython {".".join(map(str, __import__("sys").version_info[:2]))}'s standard library \
(`python-stdlib`: no tests, nothing installed beside it), under the PSF License Agreement. 3 % of the files, chosen by \
a hash of their content, were held out.
- **Training**, on CPUs: {"; then ".join(map(describe, [*arguments.parts, arguments.run]))}.
- **Special tokens**: `<s>` (id 0) begins a text, `</s>` (id 1) ends it, `<pad>` (id 2).

Held-out files: loss {run["loss"]:.3f} at the last layer; {twin["loss"]:.3f} for a twin that was trained without the \
recipe (same data, tokens, seed).

| exit layer | loss (nats a token) | agreement with the last layer |
|---|---|---|
{rows}

Greedy decoding of {decoded["num_prompts"]} HumanEval prompts, drafting {NUM_SPECULATIONS} tokens at exit \
{decoded["exit_layer"]}: {decoded["acceptance"]:.1%} of the drafts are accepted, and it is {decoded["speedup"]:.2f} \
times as fast as autoregressive decoding (two CPU threads; the median over prompts). Those prompts end in a newline, \
after which this model likes to write empty comments, whose drafts are easy: without the newline, \
{decoded["acceptance_stripped"]:.1%} of the drafts are accepted. End a prompt in the middle of a line.
"""


def main(arguments: Arguments) -> None:
    """Measure, and install."""
    torch.set_num_threads(arguments.threads)
    decoded = decode(arguments)
    print(json.dumps(decoded))
    text = card(arguments, decoded)
    if not arguments.install:
        print(text)
        return
    size = sum((arguments.run / name).stat().st_size for name in FILES)
    assert size <= MOST_BYTES, f"{size} bytes are more than the repository takes"
    for name in FILES:
        shutil.copyfile(arguments.run / name, DEMO / name)
    (DEMO / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
