"""From samples to the figures of each strategy: speed with intervals, acceptance, quality."""

import random
from collections.abc import Mapping, Sequence
from statistics import median, quantiles
from typing import Any

from layerskip.evaluation.data.metrics import combine_metrics

RESAMPLES = 2000
BASELINE = "autoregressive"
Sample = dict[str, Any]


def summarize(dataset: str, samples: dict[str, list[Sample]]) -> dict[str, Any]:
    """The `results` of a benchmark.

    Args:
        dataset: Its name.
        samples: By strategy, in the same order of prompts.
    """
    strategies = []
    for name, own in samples.items():
        row = {
            "name": name,
            "options": own[0]["options"],
            **_figures(own),
            "metrics": combine_metrics(dataset, own),
        }
        low, middle, high = None, None, None
        if BASELINE in samples and name != BASELINE:
            low, middle, high = speedup_interval(own, samples[BASELINE])
        elif name == BASELINE:
            middle = 1.0
        strategies.append({**row, "speedup": middle, "speedup_low": low, "speedup_high": high})
    return {"strategies": strategies}


def empty_note(strategies: Sequence[Mapping[str, Any]]) -> str | None:
    """What to say of rows of `summarize` with texts that end at once: their speed is that of reading prompts."""
    empty = [row for row in strategies if row.get("empty_texts")]
    if not empty:
        return None
    most = max(empty, key=lambda row: int(row["empty_texts"]))
    return (
        f"{most['empty_texts']} of {most['samples']} texts of {most['name']} are empty: the model ends them at once, "
        "and their speed is that of reading prompts. Use prompts that want an answer, or write on (ignore_eos)."
    )


def speedup_interval(ours: Sequence[Sample], baseline: Sequence[Sample]) -> tuple[float, float, float]:
    """Ratio of tokens/s, with the 95 % interval that resampling the prompts gives: lower end, ratio, upper end."""
    pick, indices = random.Random(0), range(len(ours))
    ratios = sorted(_ratio(ours, baseline, pick.choices(indices, k=len(ours))) for _ in range(RESAMPLES))
    return ratios[int(0.025 * RESAMPLES)], _ratio(ours, baseline, indices), ratios[int(0.975 * RESAMPLES) - 1]


def _ratio(ours: Sequence[Sample], baseline: Sequence[Sample], chosen: Sequence[int]) -> float:
    return _speed([ours[i] for i in chosen]) / _speed([baseline[i] for i in chosen])


def _speed(samples: Sequence[Sample]) -> float:
    return _total(samples, "tokens") / _total(samples, "seconds")


def _total(samples: Sequence[Sample], name: str) -> float:
    return float(sum(sample["stats"].get(name, 0) for sample in samples))


def _figures(samples: Sequence[Sample]) -> dict[str, Any]:
    firsts = [sample["stats"]["time_to_first_token_s"] for sample in samples]
    rest = [
        (stats["seconds"] - stats["time_to_first_token_s"]) / (stats["tokens"] - 1)
        for stats in (sample["stats"] for sample in samples)
        if stats["tokens"] > 1
    ]
    drafted, rounds = _total(samples, "drafted"), _total(samples, "rounds")
    return {
        "samples": len(samples),
        "empty_texts": sum(not sample["text"].strip() for sample in samples),
        "tokens": int(_total(samples, "tokens")),
        "seconds": _total(samples, "seconds"),
        "tokens_per_second": _speed(samples),
        "time_to_first_token_s": _spread(firsts),
        "time_per_token_s": _spread(rest),
        "acceptance_rate": _total(samples, "accepted") / drafted if drafted else 0.0,
        "mean_accepted_length": (_total(samples, "tokens") - len(samples)) / rounds if rounds else 0.0,
        "drafted_by_position": _by_position(samples, "drafted_by_position"),
        "accepted_by_position": _by_position(samples, "accepted_by_position"),
        "seconds_drafting": _total(samples, "seconds_drafting"),
        "seconds_verifying": _total(samples, "seconds_verifying"),
        "peak_memory_bytes": max(sample["memory_bytes"] for sample in samples),
    }


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"median": None, "p95": None}
    p95 = quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]
    return {"median": median(values), "p95": p95}


def _by_position(samples: Sequence[Sample], name: str) -> list[int]:
    counts = [sample["stats"].get(name, ()) for sample in samples]
    return [sum(c[i] for c in counts if i < len(c)) for i in range(max(map(len, counts), default=0))]
