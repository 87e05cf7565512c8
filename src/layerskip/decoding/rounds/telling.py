"""Log-probabilities of the tokens that rows read and gain, for rows that ask for them.

Shapes: B rows, Q positions a row, D width, V vocabulary.
"""

from collections.abc import Sequence

from torch import Tensor

from layerskip.decoding.row import Row
from layerskip.decoding.rules.logprobs import UNEMBED_CHUNK, TokenLogprobs, token_logprobs
from layerskip.model.decoder import Decoder


def tell_tokens(
    decoder: Decoder, rows: Sequence[Row], logits: Tensor, gained: Sequence[Sequence[int]]
) -> list[tuple[TokenLogprobs, ...]]:
    """How likely the tokens were that rows gained.

    Args:
        decoder: The network.
        rows: B rows.
        logits: [B, Q, W], the target's raw `own_logits` after each row's tokens and its drafts.
        gained: At most Q tokens of each row: accepted drafts, and the target's own.

    Returns:
        One for each token; none for rows that don't ask.
    """
    numbers = [row.request.config.logprobs for row in rows]
    if all(number is None for number in numbers):
        return [()] * len(rows)
    logits = decoder.whole_logits(logits)
    return [
        () if number is None else tuple(token_logprobs(logits[row, : len(gained[row])], gained[row], number))
        for row, number in enumerate(numbers)
    ]


def tell_prompts(
    decoder: Decoder, rows: Sequence[Row], starts: Sequence[int], hidden: Sequence[Tensor], num_layers: int
) -> None:
    """Note how likely the tokens of prompts are, after a chunk of them was run.

    Args:
        decoder: The network.
        rows: B rows whose prompts are read; those that don't ask aren't touched.
        starts: First position of each row's chunk.
        hidden: Of each row [tokens of its chunk, D], what norm and head read.
        num_layers: Layers that have run.
    """
    for place, (row, start) in enumerate(zip(rows, starts, strict=True)):
        number = row.request.prompt_logprobs
        if number is None or len(hidden[place]) == 0:
            continue
        if start == 0:
            row.prompt_logprobs = [None]
        following = row.tokens[start + 1 : start + 1 + len(hidden[place])]
        for first in range(0, len(following), UNEMBED_CHUNK):
            tokens = following[first : first + UNEMBED_CHUNK]
            states = hidden[place][None, first : first + len(tokens)]
            logits = decoder.unembed(states, num_layers)[0]
            row.prompt_logprobs += token_logprobs(logits, tokens, number)
