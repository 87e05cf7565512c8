"""With what drafts are written, when to stop, and what drafting in one call, or a whole round, gives.

Shapes: B rows, K drafts a row, D width.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from layerskip.model.draw import Draw

CONFIDENCE_CLASSES = 8


def confidence_class(confidence: float) -> int:
    """Class of a draft by its probability; classes are narrower at the upper end, where most drafts are."""
    if not confidence > 0:  # nor a number
        return 0
    return min(CONFIDENCE_CLASSES - 1, int(confidence * confidence * CONFIDENCE_CLASSES))


@dataclass(frozen=True, kw_only=True)
class DraftWeights:
    """How the weights that draft differ from those that verify."""

    quantize: str | None = None
    """Fewer bits, for a copy of the first half of the layers and of the head; None: the same layers."""
    tokens: tuple[int, ...] | None = None
    """Ids among which drafts are chosen; None: all."""


def frequent_tokens(text: Sequence[int], count: int, vocab_size: int, first: Sequence[int] = ()) -> tuple[int, ...]:
    """The ids that drafts are chosen among (FR-Spec).

    Source: arXiv:2502.14856. Byte-pair tokenizers number their tokens by the frequency of the pair that made them, so
    that their order serves where no text is given.

    Args:
        text: Token ids of a text; its most frequent ones come first.
        count: Ids to return.
        vocab_size: V; ids beyond those of the text follow in their order.
        first: Ids to include in any case.

    Returns:
        `count` different ids, in ascending order.
    """
    ranked = (id_ for id_, _ in Counter(text).most_common())
    chosen = dict.fromkeys(id_ for id_ in (*first, *ranked, *range(vocab_size)) if id_ < vocab_size)
    return tuple(sorted(list(chosen)[:count]))


@dataclass(frozen=True, kw_only=True)
class DraftStop:
    """When to stop drafting before the full length."""

    rates: tuple[float, ...]
    """How often a draft holds, by class of its confidence."""
    least: float
    """Drafting ends once the chance that all drafts of a row hold, on average over the rows, is below this."""


@dataclass(frozen=True, kw_only=True)
class DraftRequest:
    """What drafting in one call is to do."""

    exit_layer: int
    """E, layers to run."""
    num_drafts: int
    """K, most tokens to write in each row."""
    stop: DraftStop | None = None
    """When to write fewer."""
    draw: Draw | None = None
    """How to sample tokens; the likeliest ones are taken if not given."""
    complete: bool = True
    """Run the last draft through the layers as well."""


@dataclass(frozen=True, kw_only=True)
class Drafts:
    """Tokens written by the first layers."""

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
