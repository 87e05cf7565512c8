"""What is asked of the engine: tokens to continue, and by which rules."""

from collections.abc import Sequence
from dataclasses import dataclass

from layerskip.checks import whole_number
from layerskip.decoding.config import MOST_LOGPROBS, GenerationConfig
from layerskip.decoding.rules.constraint import Constraint
from layerskip.errors import InvalidArgumentError, PromptError, PromptTooLongError
from layerskip.model.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt with its own rules; nothing else in a batch changes what is generated after it."""

    tokens: tuple[int, ...]
    """Token ids of the prompt."""
    config: GenerationConfig
    seed: int
    """Seed of sampling."""
    max_new_tokens: int
    """Tokens to generate at most; what `check_prompt` allows."""
    eos_token_ids: frozenset[int] = frozenset()
    """Tokens that end the generation."""
    constraint: Constraint | None = None
    """What may be generated at all: one that no other request has used."""
    prompt_logprobs: int | None = None
    """Tell the log-probability of each token of the prompt, and of this many likeliest ones in its place. The whole
    prompt is read for that, whatever the cache holds already."""

    @property
    def reuses_prefix(self) -> bool:
        """Whether keys and values of earlier requests may stand for the beginning of the prompt."""
        return self.prompt_logprobs is None


def make_request(
    decoder: Decoder,
    tokens: Sequence[int],
    config: GenerationConfig,
    *,
    seed: int,
    eos_token_ids: Sequence[int] = (),
    index: int = 0,
    constraint: Constraint | None = None,
    prompt_logprobs: int | None = None,
) -> Request:
    """A checked request.

    Args:
        decoder: The network that will answer it.
        tokens: Token ids of the prompt.
        config: How to decode.
        seed: Seed of sampling.
        eos_token_ids: Tokens that end the generation, for a config that names none.
        index: The prompt's place among the caller's, for errors.
        constraint: What may be generated; a fresh one.
        prompt_logprobs: Likeliest tokens to tell in the place of each token of the prompt, with log-probabilities.

    Raises:
        PromptError: The prompt is empty, has ids outside the vocabulary, or leaves no room.
        InvalidArgumentError: An exit layer that the network doesn't have, a bias of a token outside the vocabulary, or
            a bad number of log-probabilities.
    """
    check_exit_layer(config, decoder)
    check_biases(config, decoder)
    if prompt_logprobs is not None:
        prompt_logprobs = whole_number("prompt_logprobs", prompt_logprobs, least=0, most=MOST_LOGPROBS)
    ends = eos_token_ids if config.eos_token_ids is None else config.eos_token_ids
    return Request(
        tokens=tuple(tokens),
        config=config,
        seed=seed,
        max_new_tokens=check_prompt(tokens, config, decoder, index),
        eos_token_ids=frozenset() if config.ignore_eos else frozenset(ends),
        constraint=constraint,
        prompt_logprobs=prompt_logprobs,
    )


def default_exit_layer(decoder: Decoder) -> int:
    """The exit that drafts where none is named: the first that has an adapter, or else at a quarter of the layers."""
    return decoder.adapted_exits[0] if decoder.adapted_exits else max(1, decoder.num_layers // 4)


def choose_exit_layer(config: GenerationConfig, decoder: Decoder) -> int:
    """The exit that a config means on this network: the one that drafts, or the last layer that runs.

    Raises:
        InvalidArgumentError: `exit_layer` is outside 1..L.
    """
    if config.exit_layer is not None:
        return decoder.config.check_exit_layer(config.exit_layer)
    return default_exit_layer(decoder) if config.strategy != "autoregressive" else decoder.num_layers


def check_exit_layer(config: GenerationConfig, decoder: Decoder) -> None:
    """Raise `InvalidArgumentError` if the network doesn't have the exit that a config names."""
    choose_exit_layer(config, decoder)


def check_biases(config: GenerationConfig, decoder: Decoder) -> None:
    """Raise `InvalidArgumentError` if a config has a bias for a token that the network doesn't have."""
    most = decoder.config.vocab_size - 1
    outside = next((token for token, _ in config.logit_bias if token > most), None)
    if outside is not None:
        raise InvalidArgumentError(
            f"logit_bias names the token {outside}, and the vocabulary has the ids 0 to {most}; leave it out"
        )


def depth_of(config: GenerationConfig, decoder: Decoder) -> int:
    """Layers that run over every token in the end: all, or for early exit the first E."""
    return choose_exit_layer(config, decoder) if config.strategy == "early_exit" else decoder.num_layers


def check_prompt(tokens: Sequence[int], config: GenerationConfig, decoder: Decoder, index: int = 0) -> int:
    """Tokens that may be generated after a prompt: `max_new_tokens`, or what the context leaves.

    Raises:
        PromptError: The prompt is empty, has ids outside the vocabulary, or leaves no room.
    """
    if not tokens:
        raise PromptError(f"prompt {index} is empty; give at least one token")
    decoder.config.check_token_ids(tokens, f"prompt {index}")
    room = decoder.max_context - len(tokens)
    if room < 1:
        raise PromptTooLongError(
            f"prompt {index} has {len(tokens)} tokens, and the context of {decoder.max_context} must hold it and at "
            "least one new token; shorten the prompt (max_context at loading sets the context, up to the model's own)"
        )
    return min(config.max_new_tokens, room)
