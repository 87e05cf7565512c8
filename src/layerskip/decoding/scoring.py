"""Log-likelihoods and logits of given texts, at any depth.

Shapes: Q tokens of a text, D width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerskip.decoding.rounds.plain import PREFILL_CHUNK
from layerskip.errors import PromptError
from layerskip.model.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class Score:
    """How likely a text is after another."""

    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    """Natural logarithm of each token's probability."""
    logprob: float
    """Their sum."""
    is_greedy: bool
    """Whether greedy decoding would write exactly this."""


@torch.inference_mode()
def score_tokens(
    decoder: Decoder, contexts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], num_layers: int
) -> list[Score]:
    """Score each target after its context with the first `num_layers` layers.

    Raises:
        PromptError: An empty context or target, or both together longer than the model's context.
    """
    scores = []
    for index, (context, target) in enumerate(zip(contexts, targets, strict=True)):
        if not context or not target:
            raise PromptError(f"text {index} has {len(context)} + {len(target)} tokens; both parts need at least one")
        tokens = [*context, *target]
        decoder.config.check_token_ids(tokens, f"text {index}")
        logprobs: list[float] = []
        greedy = True
        for start, logits in logits_in_chunks(decoder, tokens[:-1], num_layers):
            first = max(0, len(context) - 1 - start)
            wanted = torch.tensor(tokens[start + first + 1 : start + len(logits) + 1], device=logits.device)
            if len(wanted) == 0:
                continue
            logits = logits[first:]
            greedy = greedy and bool((logits.argmax(-1) == wanted).all())
            logprobs += logits.log_softmax(-1).gather(-1, wanted.unsqueeze(-1)).squeeze(-1).tolist()
        scores.append(
            Score(token_ids=tuple(target), token_logprobs=tuple(logprobs), logprob=sum(logprobs), is_greedy=greedy)
        )
    return scores


@torch.inference_mode()
def all_logits(decoder: Decoder, tokens: Sequence[int], num_layers: int) -> Tensor:
    """Logits after each token, [Q, V], float32."""
    return torch.cat([logits for _, logits in logits_in_chunks(decoder, tokens, num_layers)])


def logits_in_chunks(decoder: Decoder, tokens: Sequence[int], num_layers: int) -> Iterator[tuple[int, Tensor]]:
    """Pairs of a chunk's first position and its logits [Q, V].

    Raises:
        PromptError: No tokens, more than the context holds, or ids outside the vocabulary.
        NotFiniteError: A logit is infinite or not a number.
    """
    for start, hidden in exit_states_in_chunks(decoder, tokens, (num_layers,)):
        yield start, decoder.checked_logits(hidden[0], num_layers)[0]


def exit_states_in_chunks(
    decoder: Decoder, tokens: Sequence[int], exits: Sequence[int]
) -> Iterator[tuple[int, list[Tensor]]]:
    """Read a text once, in chunks, keeping the hidden states at several exits.

    Args:
        decoder: The network.
        tokens: The text.
        exits: Numbers of layers after which to keep the state, ascending.

    Yields:
        A chunk's first position, and for each exit the states [1, Q, D] that `Decoder.adapt` gives.
    """
    _check(decoder, tokens)
    cache = decoder.new_cache(1, len(tokens))
    for start in range(0, len(tokens), PREFILL_CHUNK):
        chunk = torch.tensor([list(tokens[start : start + PREFILL_CHUNK])], device=decoder.device)
        positions = decoder.place(cache, [start], chunk.shape[1])
        _, states = decoder.run_exits(decoder.embed(chunk), positions, cache, 0, decoder.depth_for(exits), exits)
        cache.commit(0, chunk.shape[1])
        yield start, [states[exit_layer] for exit_layer in exits]


def _check(decoder: Decoder, tokens: Sequence[int]) -> None:
    if not tokens:
        raise PromptError("there are no tokens; give at least one")
    if len(tokens) > decoder.max_context:
        raise PromptError(f"{len(tokens)} tokens exceed the context of {decoder.max_context}; shorten the text")
    decoder.config.check_token_ids(tokens, "the text")
