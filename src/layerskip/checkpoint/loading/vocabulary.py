"""Which tokens drafts are chosen among, where they are fewer than the vocabulary."""

from collections import Counter
from collections.abc import Sequence


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
