"""What load is put on a server: which requests, how many at once, for how long.

Nothing here imports a library: help must come at once.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from layerskip.checks import finite_number, whole_number
from layerskip.errors import InvalidArgumentError
from layerskip.files import parse_json

Endpoint = Literal["auto", "chat", "completions"]
DEFAULT_REQUESTS = 32
OURS = ("stream", "prompt", "messages", "model", "n")
"""Fields of a body that can't be replaced: answers are read as the stream of one choice."""


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """The load on a server."""

    model: str | None = None
    """Name of the model at the server; the first of /v1/models if not given."""
    endpoint: Endpoint = "auto"
    """chat: /v1/chat/completions; completions: /v1/completions; auto: chat for prompts that are messages."""
    max_tokens: int = 128
    """Most tokens of an answer."""
    temperature: float = 0.0
    """Temperature of sampling; 0 takes the most likely token."""
    seed: int | None = None
    """Seed of arrivals and synthetic prompts (0 if not given); request I is sent with the seed SEED + I."""
    ignore_eos: bool = False
    """Ask for answers of exactly max-tokens tokens (a field of vLLM's, llama.cpp's and our servers)."""
    extra_body: str | None = None
    """More fields of every request, as a JSON object: '{"generation_strategy": "autoregressive"}'."""
    concurrency: int | None = None
    """Clients that each send their next request when the last one has ended; 1 if nothing is given."""
    request_rate: float | None = None
    """Requests a second that arrive at random (Poisson), however many are still running."""
    num_requests: int | None = None
    """Requests in all; 32 if --seconds isn't given either."""
    seconds: float | None = None
    """Seconds for which new requests are sent; those that are running then are waited for."""
    warm_up: int = 2
    """Requests that are sent before, one after the other, and not counted."""
    timeout: float = 600.0
    """Seconds without a byte after which a request is given up."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            InvalidArgumentError: A value is out of range, or two don't go together.
        """
        whole_number("max_tokens", self.max_tokens, least=1)
        whole_number("warm_up", self.warm_up, least=0)
        finite_number("temperature", self.temperature, "a number of 0 or more", lambda value: value >= 0)
        finite_number("timeout", self.timeout, "a number of seconds above 0", lambda value: value > 0)
        if self.seed is not None:
            whole_number("seed", self.seed, least=0, most=2**63 - 1)
        if self.concurrency is not None:
            whole_number("concurrency", self.concurrency, least=1, most=10_000)
        if self.num_requests is not None:
            whole_number("num_requests", self.num_requests, least=1)
        for name in ("request_rate", "seconds"):
            value = getattr(self, name)
            if value is not None:
                finite_number(name, value, "a number above 0", lambda value: value > 0)
        if self.concurrency is not None and self.request_rate is not None:
            raise InvalidArgumentError(
                f"concurrency {self.concurrency} keeps so many requests running, and request_rate {self.request_rate} "
                "sends them at random times; give one of the two"
            )
        self.extra_fields()

    def extra_fields(self) -> dict[str, Any]:
        """The fields of `extra_body`.

        Raises:
            InvalidArgumentError: It isn't a JSON object, or has fields that belong to the measurement.
        """
        if self.extra_body is None:
            return {}
        try:
            fields = parse_json(self.extra_body)
        except ValueError as error:
            raise InvalidArgumentError(f"extra_body must be a JSON object, got {self.extra_body!r}: {error}") from None
        if not isinstance(fields, dict):
            raise InvalidArgumentError(f"extra_body must be a JSON object, got {self.extra_body!r}")
        if taken := [name for name in OURS if name in fields]:
            raise InvalidArgumentError(f"extra_body can't set {', '.join(taken)}: the measurement does")
        if not isinstance(fields.get("stream_options", {}), dict):
            raise InvalidArgumentError(f"extra_body's stream_options must be an object, got {self.extra_body!r}")
        return fields

    def limit(self) -> int | None:
        """Requests in all; None if only time ends the run."""
        return DEFAULT_REQUESTS if self.num_requests is None and self.seconds is None else self.num_requests


def parse_words(text: str) -> tuple[int, int]:
    """Least and most words of synthetic prompts, from a text such as 64 or 16-512.

    Raises:
        InvalidArgumentError: It is no such text.
    """
    match = re.fullmatch(r"\s*(\d{1,7})\s*(?:-\s*(\d{1,7})\s*)?", text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise InvalidArgumentError(f"prompt_words must be a number of at least 1, or two such as 16-512, got {text!r}")
    return low, high


def make_body(config: LoadConfig, model: str, prompt: str | list[dict[str, Any]], index: int) -> dict[str, Any]:
    """The body of a request.

    Args:
        config: The load.
        model: Name of the model at the server.
        prompt: A text, or messages.
        index: Number of the request in the run, from 0.
    """
    extra = config.extra_fields()
    asked: dict[str, Any]
    if path_of(config, prompt).endswith("chat/completions"):
        asked = {"messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt}
    else:
        asked = {"prompt": prompt}
    body = {"model": model, **asked, "max_tokens": config.max_tokens, "temperature": config.temperature}
    if config.seed is not None:
        body["seed"] = config.seed + index
    if config.ignore_eos:
        body["ignore_eos"] = True
    options = {"include_usage": True, **extra.pop("stream_options", {})}
    return {**body, **extra, "stream": True, "stream_options": options}


def path_of(config: LoadConfig, prompt: str | list[dict[str, Any]]) -> str:
    """Path of the endpoint for a prompt, below the server's address.

    Raises:
        InvalidArgumentError: Messages are to be sent to the endpoint for texts.
    """
    if config.endpoint == "completions" and not isinstance(prompt, str):
        raise InvalidArgumentError("endpoint completions takes texts, and this data set has messages; use chat")
    chat = config.endpoint == "chat" or not isinstance(prompt, str)
    return "/v1/chat/completions" if chat else "/v1/completions"
