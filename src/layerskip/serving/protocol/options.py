"""From the fields of a request to the rules of decoding."""

import secrets
from dataclasses import dataclass
from typing import Any

from layerskip.decoding.config import GenerationConfig, make_config
from layerskip.serving.config import RequestLimits
from layerskip.serving.protocol.errors import ApiError
from layerskip.serving.protocol.requests import GenerationBody

SEEDS = 2**63
DEFAULT_TEMPERATURE = 1.0
"""OpenAI's: a request without a temperature is sampled."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a request asks for, besides its prompts."""

    config: GenerationConfig
    num_choices: int
    seed: int
    stream: bool
    include_usage: bool
    include_drafts: bool
    num_logprobs: int | None
    """Most likely tokens whose log-probabilities are given at each place; None: not even the chosen one's."""

    def seed_of(self, choice: int) -> int:
        """Seed of one of several texts; that of the first is the request's own."""
        return (self.seed + choice) % SEEDS


def wanted(
    body: GenerationBody, limits: RequestLimits, *, max_tokens: int, logprobs: int | None, vocab_size: int
) -> Wanted:
    """What a body asks for, checked.

    Args:
        body: The request.
        limits: What it may ask for at most.
        max_tokens: Tokens to generate at most.
        logprobs: Most likely tokens whose log-probabilities are wanted; None: not even the chosen ones.
        vocab_size: Tokens of the model.

    Raises:
        ApiError: A field is out of range.
        InvalidArgumentError: A field of `GenerationConfig` is.
    """
    options = body.stream_options
    if options is not None and not body.stream:
        raise ApiError(400, "stream_options need stream to be true", param="stream_options", code="invalid_value")
    temperature = DEFAULT_TEMPERATURE if body.temperature is None else body.temperature
    given: dict[str, Any] = {
        "max_new_tokens": max_tokens,
        "temperature": temperature,
        "do_sample": temperature > 0,
        "stop": _stops(body.stop, limits),
        "ignore_eos": bool(body.ignore_eos),
    }
    if logprobs is not None:
        given["logprobs"] = logprobs
    if body.logit_bias:
        given["logit_bias"] = _biases(body.logit_bias, limits, vocab_size)
    for name in OPTIONS:
        value = getattr(body, name)
        if value is not None:
            given[name] = value
    seed = secrets.randbits(63) if body.seed is None else body.seed % SEEDS
    return Wanted(
        config=make_config(None, given),
        num_choices=body.n or 1,
        seed=seed,
        stream=bool(body.stream),
        include_usage=bool(options and options.include_usage),
        include_drafts=bool(options and options.include_drafts),
        num_logprobs=logprobs,
    )


OPTIONS = (
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "generation_strategy",
    "exit_layer",
    "num_speculations",
)
"""Fields that requests and `GenerationConfig` have under one name."""


def _stops(given: str | list[str] | None, limits: RequestLimits) -> tuple[str, ...]:
    stops = (given,) if isinstance(given, str) else tuple(given or ())
    stops = tuple(stop for stop in stops if stop)  # an empty one stops nothing
    if len(stops) > limits.stop_strings or any(len(stop) > limits.stop_characters for stop in stops):
        raise ApiError(
            400,
            f"stop may have up to {limits.stop_strings} texts of up to {limits.stop_characters} characters, got "
            f"{len(stops)} of up to {max(map(len, stops))}",
            param="stop",
            code="invalid_value",
        )
    return stops


def _biases(given: dict[str, float], limits: RequestLimits, vocab_size: int) -> dict[int, float]:
    if len(given) > limits.logit_biases:
        message = f"logit_bias may name up to {limits.logit_biases} tokens, got {len(given)}"
        raise ApiError(400, message, param="logit_bias", code="invalid_value")
    biases = {}
    for token, bias in given.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < vocab_size):
            message = f"logit_bias names tokens by their ids, from 0 to {vocab_size - 1}, got {token[:40]!r}"
            raise ApiError(400, message, param="logit_bias", code="invalid_value")
        biases[int(token)] = bias
    return biases
