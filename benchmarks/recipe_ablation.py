"""Effect of each part of the recipe: {plain, dropout, exit loss, both} x {ce, kl, lk}, otherwise equal, three seeds.

    python benchmarks/recipe_ablation.py
    python benchmarks/recipe_ablation.py --seeds 0 --base-steps 50 --max-steps 20 --folder /tmp/ablation

For every seed a small model is trained from scratch without the recipe on Python's standard library; every variant
continues from it, with the same data in the same order. Each run is one `layerskip.train` in a process; two go at a
time. Runs that are done are not repeated, and one that was stopped goes on: start it again until the table is complete.
Exits have equal weights, because the paper's weights give the drafting exits very little; one variant has the paper's.
Drafts are measured by decoding: beginnings of held-out files, exit L/4, K = 4; greedily, and sampled at temperature 1
with coupled noise. The table and the plot of docs/recipe.md come last.
"""

import json
import multiprocessing
import os
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from record import write_record

SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 12,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
LOSSES = ("ce", "kl", "lk")
DROPOUT, NO_DROPOUT = {"dropout_max": 0.2}, {"dropout_max": 0.0}
EQUAL = {"exit_weights": "equal", "exit_loss_scale": 1.0}
VARIANTS = {
    "plain": {**NO_DROPOUT, "exit_loss_scale": 0.0},
    "dropout": {**DROPOUT, "exit_loss_scale": 0.0},
    **{f"exit loss ({loss})": {**NO_DROPOUT, **EQUAL, "exit_loss": loss} for loss in LOSSES},
    **{f"both ({loss})": {**DROPOUT, **EQUAL, "exit_loss": loss} for loss in LOSSES},
    "both (ce), weights by depth": {**DROPOUT, "exit_loss_scale": 0.2, "exit_loss": "ce"},
    "both (kl), exits 3 and 6 only": {**DROPOUT, **EQUAL, "exit_loss": "kl", "exit_layers": (3, 6), "rotation": 1},
    "both (kl), stop-gradient": {**DROPOUT, **EQUAL, "exit_loss": "kl", "stop_gradient": True},
    "both (kl), LoRA of rank 16": {**DROPOUT, **EQUAL, "exit_loss": "kl", "lora_rank": 16},
}
NUM_SPECULATIONS, NUM_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 24, 32, 64


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark."""

    folder: Path = Path("runs/recipe_ablation")
    """Folder of the runs."""
    base_steps: int = 600
    """Optimizer steps of 1,024 tokens of the model that the variants continue from."""
    max_steps: int = 250
    """Optimizer steps of each variant."""
    seeds: tuple[int, ...] = (0, 1, 2)
    workers: int = 2
    docs: Path | None = None
    """Folder for the plot recipe_ablation.png; the table is printed."""


def make_tokenizer(folder: Path) -> None:
    """One tokenizer for all runs."""
    from layerskip.training.data.corpus import corpus_texts
    from layerskip.training.data.tokenizer import train_tokenizer

    if not (folder / "tokenizer.json").exists():
        vocab_size = SHAPE["vocab_size"]
        assert isinstance(vocab_size, int)
        train_tokenizer(corpus_texts(data_config()), vocab_size).save_pretrained(folder)


def data_config() -> Any:
    """The data of all runs."""
    import layerskip

    return layerskip.DataConfig(data=("python-stdlib",), sequence_length=128, held_out=0.03, eval_tokens=32768)


def train_run(output: Path, start: Any, recipe: Any, *, max_steps: int, learning_rate: float, seed: int) -> Any:
    """One run, resumed if it was stopped; returns its result."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    import layerskip
    from layerskip.cli.terminal.terminal import silence_libraries

    torch.set_num_threads(1)
    silence_libraries(bars=False)
    config = layerskip.TrainingConfig(
        start=start,
        data=data_config(),
        recipe=recipe,
        optimization=layerskip.OptimizationConfig(
            max_steps=max_steps, batch_size=8, learning_rate=learning_rate, min_learning_rate=0.1, seed=seed
        ),
        checkpoints=layerskip.CheckpointConfig(save_steps=200, eval_steps=max_steps, keep=1),
    )
    return layerskip.train(config, output, resume=(output / "training.toml").exists())


def train_base(folder: Path, shape: Path, seed: int, steps: int) -> Path:
    """Train the model that the variants of one seed continue from, unless it exists; returns its folder."""
    import layerskip

    output = folder / f"base-{seed}"
    if not (output / "training.json").exists():
        start = layerskip.StartConfig(config=str(shape), tokenizer=str(folder))
        recipe = layerskip.LayerSkipConfig(dropout_max=0.0, exit_loss_scale=0.0)
        train_run(output, start, recipe, max_steps=steps, learning_rate=3e-3, seed=seed)
    return output


def train_variant(folder: Path, base: Path, variant: str, seed: int, max_steps: int) -> dict[str, Any]:
    """Train one variant, or read the results of an earlier training; returns its numbers."""
    import layerskip

    output = folder / f"{variant.translate(str.maketrans({' ': '_', ',': None, '(': None, ')': None}))}-{seed}"
    record = output / "ablation.json"
    if record.exists():
        found: dict[str, Any] = json.loads(record.read_text())
        return found
    settings: dict[str, Any] = {"rotation": 6, **VARIANTS[variant]}
    start = layerskip.StartConfig(model=str(base), lora_rank=settings.pop("lora_rank", None))
    recipe = layerskip.LayerSkipConfig(**settings)
    result = train_run(output, start, recipe, max_steps=max_steps, learning_rate=1e-3, seed=100 + seed)
    numbers = {
        "variant": variant,
        "seed": seed,
        "num_tokens": result.num_tokens,
        "loss": result.loss,
        "agreement": [quality.agreement for quality in result.exits],
        "exit_loss": [quality.loss for quality in result.exits],
        **measure_drafts(output, data_config()),
    }
    record.write_text(json.dumps(numbers))
    return numbers


def measure_drafts(output: Path, data: Any) -> dict[str, float]:
    """Mean number of accepted drafts in a round, greedy and sampled."""
    import layerskip
    from layerskip.training.data.corpus import load_corpus

    lm = layerskip.load(str(output))
    held_out = load_corpus(data, lm.tokenizer).held_out
    stride = max(1, len(held_out) // NUM_PROMPTS)
    prompts = [held_out[i]["input_ids"][:PROMPT_TOKENS].tolist() for i in range(0, len(held_out), stride)][:NUM_PROMPTS]
    found = {}
    for name, options in (("greedy", {}), ("sampled", {"temperature": 1.0, "do_sample": True, "seed": 0})):
        results = lm.generate(
            prompts,
            max_new_tokens=NEW_TOKENS,
            ignore_eos=True,
            generation_strategy="self_speculative",
            exit_layer=lm.decoder.num_layers // 4,
            num_speculations=NUM_SPECULATIONS,
            **options,
        )
        rounds = sum(result.stats.rounds for result in results)
        found[f"accepted_{name}"] = sum(result.stats.accepted for result in results) / rounds
    return found


def run_all(arguments: Arguments) -> Iterator[dict[str, Any]]:
    """Numbers of every run, as the runs end."""
    arguments.folder.mkdir(parents=True, exist_ok=True)
    shape = arguments.folder / "config.json"
    shape.write_text(json.dumps(SHAPE))
    make_tokenizer(arguments.folder)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
        bases = [
            pool.submit(train_base, arguments.folder, shape, seed, arguments.base_steps) for seed in arguments.seeds
        ]
        jobs = [
            pool.submit(train_variant, arguments.folder, base.result(), variant, seed, arguments.max_steps)
            for base, seed in zip(bases, arguments.seeds, strict=True)
            for variant in VARIANTS
        ]
        for number, job in enumerate(as_completed(jobs), 1):
            numbers = job.result()
            print(f"{number} of {len(jobs)}: {numbers['variant']}, seed {numbers['seed']}", flush=True)
            yield numbers


def spread(values: list[float], *, percent: bool = False, digits: int = 3) -> str:
    """Mean and half the range: `0.612 ± 0.004`."""
    half = (max(values) - min(values)) / 2
    mean = statistics.mean(values)
    return f"{mean:.1%} ± {half:.1%}" if percent else f"{mean:.{digits}f} ± {half:.{digits}f}"


def make_table(runs: list[dict[str, Any]]) -> str:
    """Markdown table with a row for each variant."""
    layers = SHAPE["num_hidden_layers"]
    assert isinstance(layers, int)
    lines = [
        f"| variant | loss, last layer | agreement at {layers // 4} of {layers} | at {layers // 2} | "
        f"accepted of {NUM_SPECULATIONS}, greedy | sampled |",
        "|---|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        mine = [run for run in runs if run["variant"] == variant]
        cells = [
            spread([run["loss"] for run in mine]),
            spread([run["agreement"][layers // 4 - 1] for run in mine], percent=True),
            spread([run["agreement"][layers // 2 - 1] for run in mine], percent=True),
            spread([run["accepted_greedy"] for run in mine], digits=2),
            spread([run["accepted_sampled"] for run in mine], digits=2),
        ]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Plot the agreement by exit, a line for each variant; its band is the range over seeds."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for index, variant in enumerate(VARIANTS):
        curves = [run["agreement"] for run in runs if run["variant"] == variant]
        exits = range(1, len(curves[0]) + 1)
        columns = list(zip(*curves, strict=True))
        color = colormaps["tab20"](index)
        axes.plot(exits, [statistics.mean(column) for column in columns], "o-", ms=3, color=color, label=variant)
        axes.fill_between(exits, list(map(min, columns)), list(map(max, columns)), color=color, alpha=0.2)
    axes.set(xlabel="exit layer", ylabel="agreement with the last layer", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(arguments: Arguments) -> None:
    """Train, measure, print and record."""
    runs = list(run_all(arguments))
    print(make_table(runs))
    print(
        write_record(
            "recipe_ablation",
            {"base_steps": arguments.base_steps, "max_steps": arguments.max_steps, "shape": SHAPE, "runs": runs},
        )
    )
    if arguments.docs is not None:
        draw(runs, arguments.docs / "recipe_ablation.png")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
