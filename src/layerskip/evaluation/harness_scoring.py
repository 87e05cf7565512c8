"""Log-likelihoods of several continuations of one context, which is read once.

Shapes: Q tokens, D width, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from layerskip.decoding.autoregressive import PREFILL_CHUNK
from layerskip.model.cache import KVCache
from layerskip.model.decoder import Decoder

Likelihood = tuple[float, bool]
"""Logarithm of a continuation's probability, and whether greedy decoding would write exactly it."""


@torch.inference_mode()
def score_continuations(
    decoder: Decoder, context: Sequence[int], continuations: Sequence[Sequence[int]], num_layers: int
) -> list[Likelihood]:
    """Score each continuation after the context with the first `num_layers` layers.

    The passes of one continuation don't depend on which others there are, so that a run which goes on after an
    interruption finds the very numbers of one that wasn't interrupted.

    Args:
        decoder: The network.
        context: Token ids, at least one.
        continuations: Token ids of each, at least one; with all but its last token, the context must fit into the
            model's context.
        num_layers: Layers to run.

    Raises:
        PromptError: Ids outside the vocabulary.
    """
    read = len(context) - 1
    decoder.config.check_token_ids(context, "a context")
    cache = decoder.new_cache(1, read + max(map(len, continuations)))
    for start in range(0, read, PREFILL_CHUNK):
        _run(decoder, context[start : min(read, start + PREFILL_CHUNK)], cache, num_layers)
    scored: dict[tuple[int, ...], list[int]] = {}  # those that differ in their last token only need one pass
    for place, continuation in enumerate(continuations):
        decoder.config.check_token_ids(continuation, "a continuation")
        scored.setdefault(tuple(continuation[:-1]), []).append(place)
    results: list[Likelihood] = [(0.0, True)] * len(continuations)
    for body, places in scored.items():
        inputs = [context[-1], *body]
        for start in range(0, len(inputs), PREFILL_CHUNK):
            chunk = inputs[start : start + PREFILL_CHUNK]
            logits = decoder.unembed(_run(decoder, chunk, cache, num_layers))[0]
            likeliest, logprobs = logits.argmax(-1), logits.log_softmax(-1)
            for place in places:
                wanted = torch.tensor(continuations[place][start : start + len(chunk)], device=logits.device)
                total, greedy = results[place]
                total += logprobs.gather(-1, wanted.unsqueeze(-1)).sum(dtype=torch.float64).item()
                results[place] = total, greedy and bool((likeliest == wanted).all())
        cache.rollback(0, read)
    return results


def _run(decoder: Decoder, tokens: Sequence[int], cache: KVCache, num_layers: int) -> Tensor:
    """Read the next tokens of the text in the cache; returns their states [1, Q, D]."""
    positions = decoder.place(cache, [cache.lengths[0]], len(tokens))
    hidden = decoder.embed(torch.tensor([list(tokens)], device=decoder.device))
    hidden = decoder.run_layers(hidden, positions, cache, 0, num_layers)
    cache.commit(0, len(tokens))
    return hidden
