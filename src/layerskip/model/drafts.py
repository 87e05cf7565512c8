"""What drafting in one call, or a whole round, takes and gives.

Shapes: B rows, K drafts a row, D width.
"""

from dataclasses import dataclass

from torch import Tensor

CONFIDENCE_CLASSES = 8


def confidence_class(confidence: float) -> int:
    """Class of a draft by its probability; classes are narrower at the upper end, where most drafts are."""
    return min(CONFIDENCE_CLASSES - 1, int(confidence * confidence * CONFIDENCE_CLASSES))


@dataclass(frozen=True, kw_only=True)
class DraftStop:
    """When to stop drafting before the full length."""

    rates: tuple[float, ...]
    """How often a draft holds, by class of its confidence."""
    least: float
    """Drafting ends once the chance that all drafts of a row hold, on average over the rows, is below this."""


@dataclass(frozen=True, kw_only=True)
class GreedyDrafts:
    """Likeliest tokens, written by the first layers."""

    tokens: Tensor
    """[B, K]."""
    hidden: Tensor
    """[B, K + 1, D], outputs of the exit for the token before the drafts and for the drafts."""
    confidences: list[list[float]]
    """B x K probabilities of the drafts; empty without a `DraftStop`."""


@dataclass(frozen=True, kw_only=True)
class GreedyRound:
    """Likeliest tokens of a whole round, on the host."""

    drafts: Tensor
    """[B, K], those of the exit."""
    targets: Tensor
    """[B, K + 1], those of the last layer after the pending token and after each draft."""
