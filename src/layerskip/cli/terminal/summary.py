"""What a generation cost, as a table beside autoregressive decoding and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from layerskip.cli.terminal.stream import Run, follow, ignore
from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.output.events import GenerationResult
from layerskip.decoding.request import choose_exit_layer
from layerskip.language_model import LanguageModel
from layerskip.model.decoders.graphs import GraphDecoder

if TYPE_CHECKING:
    from rich.table import Table

    from layerskip.cli.terminal.explanation import Explanation

WARM_UP_TOKENS = 8


def autoregressive(config: GenerationConfig, seed: int | None = None) -> GenerationConfig:
    """The same decoding without drafts, with all layers."""
    seed = config.seed if seed is None else seed
    return replace(config, generation_strategy="autoregressive", exit_layer=None, seed=seed)


def warm_up(lm: LanguageModel, prompt: str | list[int], config: GenerationConfig) -> None:
    """Write a few tokens in both ways, so that neither is timed while memory and threads are set up.

    Where rounds are compiled, write all: which ones are needed depends on the lengths that the text goes through.
    """
    tokens = (
        config.max_new_tokens if isinstance(lm.decoder, GraphDecoder) else min(WARM_UP_TOKENS, config.max_new_tokens)
    )
    short = replace(config, max_new_tokens=tokens)
    for each in (short, autoregressive(short)):
        lm.generate([prompt], each)


def compare(lm: LanguageModel, prompt: str, config: GenerationConfig, seed: int) -> Run:
    """Decode a prompt autoregressively with the seed that was used, without showing it."""
    return follow(lm.stream(prompt, autoregressive(config, seed)), ignore)


def is_same_text(config: GenerationConfig, ours: Sequence[int], reference: Sequence[int]) -> bool | None:
    """Whether both ways wrote the same tokens; None where they needn't: rejection keeps the distribution only."""
    if config.samples and config.acceptance == "rejection":
        return None
    return list(ours) == list(reference)


def result_record(
    lm: LanguageModel, config: GenerationConfig, result: GenerationResult, prompt: str = ""
) -> dict[str, Any]:
    """A result with the settings that it came from, for JSON.

    Args:
        lm: The model.
        config: How it was decoded.
        result: The result.
        prompt: What it was written after, which also says what ends it.
    """
    eos = config.eos_token_ids
    if eos is None:
        eos = lm.end_tokens(lm.encode(prompt)[0]) if prompt else lm.checkpoint.eos_token_ids
    adaptive = config.strategy == "adaptive"
    resolved = {
        "generation_strategy": config.strategy,
        "exit_layer": config.exit_layer if adaptive else choose_exit_layer(config, lm.decoder),
        "num_speculations": config.num_speculations if adaptive else config.draft_length,
        "do_sample": config.samples,
        "seed": result.seed,
        "eos_token_ids": list(eos),
    }
    told = {name: value for name, value in asdict(result).items() if value is not None or "logprobs" not in name}
    return {**told, "model": lm.checkpoint.name, "config": asdict(config) | resolved}


def describe(lm: LanguageModel, config: GenerationConfig, seed: int) -> str:
    """The settings in a line."""
    layers = f"{choose_exit_layer(config, lm.decoder)} of {lm.decoder.num_layers} layers"
    work = {
        "adaptive": "adaptive",
        "ngram": f"drafts of {config.draft_length} tokens from the text itself",
        "self_speculative": f"{layers} draft {config.draft_length} tokens a round",
        "autoregressive": f"{layers} run",
    }[config.strategy]
    choice = f"sampling with seed {seed}" if config.samples else "greedy"
    return f"{work}, {choice}{_describe_compilation(lm)}"


def explanation_lines(explanation: "Explanation") -> list[str]:
    """An explanation, for people."""
    lines = list(explanation.reasons)
    for outlook in explanation.exits:
        lines.append(
            f"exit {outlook.exit_layer}: right {outlook.acceptance:.0%} of the time (pays from {outlook.needed:.0%}), "
            f"{outlook.num_speculations} drafts would give {outlook.speedup:.2f}x; used in {outlook.rounds} rounds"
        )
    lines.append(
        f"A step takes {explanation.step_ms:.2f} ms; "
        f"verifying four drafts {explanation.verification_ratio:.2f} times that."
    )
    return lines


def _describe_compilation(lm: LanguageModel) -> str:
    """How many rounds have been compiled and how long that took, or why it failed; empty where nothing was tried."""
    compiled = lm.decoder.compiled if isinstance(lm.decoder, GraphDecoder) else ()
    if not compiled:
        return ""
    problem = compiled[-1].problem  # nothing is tried after a failure
    if problem is not None:
        return f", not compiled: {problem}"
    return f", {len(compiled)} rounds compiled in {sum(round_.seconds for round_ in compiled):.1f} s"


def stats_table(run: Run, reference: Run | None = None, *, same_text: bool | None = None) -> "Table":
    """Figures of a generation, beside those of the same text decoded autoregressively.

    Args:
        run: The generation.
        reference: The same prompt without drafts.
        same_text: Whether both have the same tokens; None if that isn't to be expected.
    """
    from rich.table import Table

    stats = run.result.stats
    table = Table(show_header=reference is not None)
    table.add_column("")
    table.add_column("self-speculative" if stats.drafted else "this run", justify="right")
    rows = [
        ("tokens", _count(stats.tokens)),
        ("tokens/s", f"{run.tokens_per_second:.1f}"),
        ("first token after", f"{stats.time_to_first_token_s * 1000:.0f} ms"),
        ("layer calls", _count(stats.layer_calls)),
    ]
    if stats.drafted:
        rows += speculation_rows(stats.accepted, stats.drafted, stats.mean_accepted_length)
    other: list[str] = []
    if reference is not None:
        table.add_column("autoregressive", justify="right")
        plain = reference.result.stats
        other = [
            _count(plain.tokens),
            f"{reference.tokens_per_second:.1f}",
            f"{plain.time_to_first_token_s * 1000:.0f} ms",
            _count(plain.layer_calls),
        ]
        rows.append(("speed", f"{run.tokens_per_second / reference.tokens_per_second:.2f}x"))
        other += [""] * (len(rows) - len(other) - 1) + ["1.00x"]
        rows.append(("same text", {True: "yes", False: "NO", None: "not expected"}[same_text]))
    for place, row in enumerate(rows):
        table.add_row(*row, *other[place : place + 1])
    return table


def speculation_rows(accepted: int, drafted: int, mean_accepted_length: float) -> list[tuple[str, str]]:
    """Rows of a table that say what the drafts were worth."""
    return [
        ("drafts accepted", f"{accepted / max(drafted, 1):.1%} of {_count(drafted)}"),
        ("tokens a round", f"{mean_accepted_length:.2f}"),
    ]


def difference(ours: Sequence[int], reference: Sequence[int]) -> str:
    """Says where two texts differ that should be the same, and what to do."""
    place = next((i for i, (a, b) in enumerate(zip(ours, reference, strict=False)) if a != b), None)
    place = min(len(ours), len(reference)) if place is None else place
    return (
        f"The texts differ from token {place} on; `layerskip verify` says whether that is a near-tie, which rounding "
        "decides, or an error."
    )


def _count(number: int) -> str:
    return f"{number:,}"
