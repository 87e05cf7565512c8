"""From samples to the figures of a load: throughput, latencies and their percentiles, acceptance, errors.

Latencies are of requests that were answered in full. Throughput divides by the time from the first request to the last
answer, added up over the attempts of a run that was interrupted.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Sample = Mapping[str, Any]
PERCENTILES = (50, 90, 95, 99)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value below which a share of values lies, with a straight line between neighbours.

    Args:
        ordered: At least one value, in ascending order.
        percent: 0 to 100.
    """
    place = (len(ordered) - 1) * percent / 100
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (high - low) * (place - math.floor(place))


def spread(values: Iterable[float]) -> dict[str, float | int | None]:
    """Mean and percentiles of values, and how many there are; None for each if there are none."""
    ordered = sorted(values)
    if not ordered:
        return {"mean": None, **{f"p{percent}": None for percent in PERCENTILES}, "max": None, "count": 0}
    found = {f"p{percent}": percentile(ordered, percent) for percent in PERCENTILES}
    return {"mean": math.fsum(ordered) / len(ordered), **found, "max": ordered[-1], "count": len(ordered)}


def span_of(samples: Sequence[Sample]) -> float:
    """Seconds from the first request to the last answer, added up over attempts."""
    attempts: dict[int, list[Sample]] = {}
    for sample in samples:
        attempts.setdefault(int(sample["attempt"]), []).append(sample)
    return sum(
        max(float(each["start"]) + float(each["seconds"]) for each in own) - min(float(each["start"]) for each in own)
        for own in attempts.values()
    )


def summarize(samples: Sequence[Sample], *, client_share: float | None = None) -> dict[str, Any]:
    """The `results` of a load.

    Args:
        samples: One for each request.
        client_share: Share of a core that the client took.
    """
    answered = [sample for sample in samples if sample["error"] is None]
    seconds, tokens = span_of(samples), sum(map(tokens_of, answered))
    rate = 1 / seconds if seconds else 0.0
    pieces = sum(len(sample["gaps"]) + 1 for sample in answered if sample["first"] is not None)
    return {
        "requests": len(samples),
        "answered": len(answered),
        "errors": errors_by_kind(samples),
        "seconds": seconds,
        "requests_per_second": len(answered) * rate,
        "output_tokens": tokens,
        "output_tokens_per_second": tokens * rate,
        "prompt_tokens": sum(sample["prompt_tokens"] or 0 for sample in answered),
        "tokens_counted_by": counted_by(answered),
        "tokens_per_piece": tokens / pieces if pieces else None,
        "time_to_first_token_s": spread(sample["first"] for sample in answered if sample["first"] is not None),
        "inter_token_s": spread(inter_token(answered)),
        "time_per_token_s": spread(each for sample in answered if (each := time_per_token(sample)) is not None),
        "piece_gap_s": spread(gap for sample in answered for gap in sample["gaps"]),
        "end_to_end_s": spread(sample["seconds"] for sample in answered),
        "speculation": acceptance(answered),
        "client_share": client_share,
    }


def tokens_of(sample: Sample) -> int:
    """Tokens of an answer: as the server counts them, or else its pieces."""
    if sample["tokens"] is not None:
        return int(sample["tokens"])
    return len(sample["gaps"]) + (sample["first"] is not None)


def counted_by(samples: Sequence[Sample]) -> str | None:
    """How tokens were counted: usage, pieces, or both; None without samples."""
    found = {"pieces" if sample["tokens"] is None else "usage" for sample in samples}
    return "both" if len(found) > 1 else next(iter(found), None)


def inter_token(samples: Sequence[Sample]) -> list[float]:
    """Seconds for each token of all answers; empty unless it is known of all: the others would be the faster ones."""
    if any(sample["gaps"] and sample["piece_tokens"] is None for sample in samples):
        return []
    return [gap for sample in samples for gap in token_gaps(sample)]


def token_gaps(sample: Sample) -> list[float]:
    """Seconds for each token after the first piece; empty where it isn't known how many tokens a piece has."""
    counts = sample["piece_tokens"]
    if counts is None:
        return []
    return [gap / count for gap, count in zip(sample["gaps"], counts[1:], strict=True) for _ in range(count)]


def time_per_token(sample: Sample) -> float | None:
    """Mean seconds for a token after the first piece; None of answers in one piece."""
    counts = sample["piece_tokens"]
    later = tokens_of(sample) - 1 if counts is None else sum(counts[1:])
    return sum(sample["gaps"]) / later if sample["gaps"] and later > 0 else None


def errors_by_kind(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Kinds of errors, the most frequent first, each with its number and one of its messages."""
    errors = [sample["error"] for sample in samples if sample["error"] is not None]
    examples = {error["kind"]: error["message"] for error in reversed(errors)}
    counts = Counter(error["kind"] for error in errors)
    return [{"kind": kind, "count": count, "example": examples[kind]} for kind, count in counts.most_common()]


def acceptance(samples: Sequence[Sample]) -> dict[str, Any] | None:
    """Rounds, drafts and accepted drafts of all answers; None where the server doesn't tell."""
    told = [sample["speculation"] for sample in samples if sample["speculation"] is not None]
    if not told:
        return None
    rounds, drafted, accepted = (
        sum(_whole(each.get(name)) for each in told)
        for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    )
    return {
        "requests": len(told),
        "num_drafts": rounds,
        "num_draft_tokens": drafted,
        "num_accepted_tokens": accepted,
        "draft_acceptance_rate": accepted / drafted if drafted else None,
        "mean_acceptance_length": 1 + accepted / rounds if rounds else None,
        "drafted_by_position": _added(each.get("draft_histogram") for each in told),
        "accepted_by_position": _added(each.get("acceptance_histogram") for each in told),
    }


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _added(lists: Iterable[Any]) -> list[int]:
    """The sums of lists, place by place."""
    kept = [each for each in lists if isinstance(each, list)]
    longest = max(map(len, kept), default=0)
    return [sum(_whole(each[place]) for each in kept if place < len(each)) for place in range(longest)]
