"""Log-likelihoods of several continuations of one context at several exits, which all take one pass.

Shapes: Q tokens, D width, V vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from layerskip.decoding.rounds.plain import PREFILL_CHUNK
from layerskip.model.cache import KVCache
from layerskip.model.decoder import Decoder

Likelihood = tuple[float, bool]
"""Logarithm of a continuation's probability, and whether greedy decoding would write exactly it."""


@torch.inference_mode()
def score_continuations(
    decoder: Decoder, context: Sequence[int], continuations: Sequence[Sequence[int]], exit_layers: Sequence[int]
) -> list[list[Likelihood]]:
    """Score each continuation after the context at every exit.

    What a continuation scores doesn't depend on which others there are, or which exits, so that a run which goes on
    after an interruption finds the very numbers of one that wasn't interrupted.

    Args:
        decoder: The network.
        context: Token ids, at least one.
        continuations: Token ids of each, at least one; with all but its last token, the context must fit into the
            model's context.
        exit_layers: Exits, ascending.

    Returns:
        By exit, by continuation.

    Raises:
        PromptError: Ids outside the vocabulary.
    """
    read = len(context) - 1
    decoder.config.check_token_ids(context, "a context")
    cache = decoder.new_cache(1, read + max(map(len, continuations)))
    for start in range(0, read, PREFILL_CHUNK):
        _run(decoder, context[start : min(read, start + PREFILL_CHUNK)], cache, exit_layers[-1:])
    scored: dict[tuple[int, ...], list[int]] = {}  # those that differ in their last token only need one pass
    for place, continuation in enumerate(continuations):
        decoder.config.check_token_ids(continuation, "a continuation")
        scored.setdefault(tuple(continuation[:-1]), []).append(place)
    results: list[list[Likelihood]] = [[(0.0, True)] * len(continuations) for _ in exit_layers]
    for body, places in scored.items():
        inputs = [context[-1], *body]
        for start in range(0, len(inputs), PREFILL_CHUNK):
            chunk = inputs[start : start + PREFILL_CHUNK]
            wanted = {place: continuations[place][start : start + len(chunk)] for place in places}
            states = _run(decoder, chunk, cache, exit_layers)
            for exit_layer, scores, state in zip(exit_layers, results, states, strict=True):
                _add_scores(scores, decoder.checked_logits(state, exit_layer)[0], wanted)
        cache.rollback(0, read)
    return results


def _add_scores(results: list[Likelihood], logits: Tensor, wanted: Mapping[int, Sequence[int]]) -> None:
    """Add the scores of tokens, by the continuation's place, of which `logits` [Q, V] are the predictions."""
    likeliest, logprobs = logits.argmax(-1), logits.log_softmax(-1)
    for place, tokens in wanted.items():
        ids = torch.tensor(tokens, device=logits.device)
        total, greedy = results[place]
        total += logprobs.gather(-1, ids.unsqueeze(-1)).sum(dtype=torch.float64).item()
        results[place] = total, greedy and bool((likeliest == ids).all())


def _run(decoder: Decoder, tokens: Sequence[int], cache: KVCache, exit_layers: Sequence[int]) -> list[Tensor]:
    """Read the next tokens of the text in the cache; returns their states [1, Q, D] at each exit."""
    positions = decoder.place(cache, cache.lengths, len(tokens))
    hidden = decoder.embed(torch.tensor([list(tokens)], device=decoder.device))
    _, states = decoder.run_exits(hidden, positions, cache, 0, decoder.depth_for(exit_layers), exit_layers)
    cache.commit(0, len(tokens))
    return [states[exit_layer] for exit_layer in exit_layers]
