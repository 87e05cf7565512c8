"""How to decode: one frozen dataclass, checked once, shared by the Python API and the command line."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from layerskip.checks import check_text, finite_number, whole_number
from layerskip.errors import InvalidArgumentError

Strategy = Literal["adaptive", "autoregressive", "self_speculative", "ngram", "early_exit"]
Acceptance = Literal["coupled", "rejection"]

DEFAULT_DRAFT_LENGTH = 4
MIN_TEMPERATURE = 1e-6
"""Below it, sampling is greedy: logits divided by less could overflow."""
MAX_PENALTY = 1e6
"""Largest repetition penalty, and one over the smallest: logits multiplied by more could overflow."""
MOST_COUNT_PENALTY = 2.0
"""Largest frequency and presence penalty, as OpenAI has it; the smallest is its negative."""
MOST_BIAS = 100.0
"""Largest bias of a token, as OpenAI has it; the smallest is its negative."""
MOST_LOGPROBS = 20
"""Most likeliest tokens at each position whose log-probabilities are told."""


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Options of a generation; names are Hugging Face's, those of speculation Meta's."""

    max_new_tokens: int = 128
    """Most tokens to write for each prompt."""
    generation_strategy: Strategy | None = None
    """autoregressive: one token a step. self_speculative: draft with the early layers, verify with the rest. ngram:
    draft what followed the text's last tokens where they occurred before. adaptive: what is fastest, round by round.
    early_exit: run the first exit_layer layers only, which is faster and changes the text. If not given:
    self_speculative where exit_layer or num_speculations is given, else adaptive."""
    exit_layer: int | None = None
    """Layers that draft (1..L), or with early_exit layers that run at all; if not given, adaptive chooses, and others
    take a quarter of the layers."""
    num_speculations: int | None = None
    """Most tokens to draft in a round; if not given, adaptive chooses, and others draft 4."""
    do_sample: bool | None = None
    """Sample, or take the most likely token. If not given: sample when temperature, top-k, top-p or min-p is set."""
    temperature: float | None = None
    """Divides the logits; 0 is greedy, and so is anything below 1e-6. Sampling takes 1 if it isn't given."""
    top_k: int = 0
    """Sample among the k most likely tokens only; 0 is all."""
    top_p: float = 1.0
    """Sample among the most likely tokens that together have this probability."""
    min_p: float = 0.0
    """Sample among tokens with at least this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that occurred already become less likely."""
    no_repeat_ngram_size: int = 0
    """No run of this many tokens occurs twice; 0 is off."""
    frequency_penalty: float = 0.0
    """From -2 to 2: is taken from a token's logit once for each time it was generated; the prompt doesn't count."""
    presence_penalty: float = 0.0
    """From -2 to 2: is taken from the logit of every token that was generated before; the prompt doesn't count."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs of a token id and a number from -100 to 100 that is added to its logit; a mapping will do."""
    logprobs: int | None = None
    """Tell the log-probability of each token, and of this many likeliest ones in its place (0 to 20). They are those of
    the model itself, before temperature, penalties and biases."""
    seed: int | None = None
    """Seed of sampling, used for every prompt alike; a new one for each call if not given."""
    acceptance: Acceptance = "coupled"
    """coupled: the very text that autoregressive sampling gives with this seed. rejection: same distribution."""
    block_verification: bool = True
    """With rejection, accept drafts as a block, which keeps more of them than one by one."""
    stop: tuple[str, ...] = ()
    """Texts that end the generation, also names of special tokens; they aren't part of the result."""
    eos_token_ids: tuple[int, ...] | None = None
    """Token ids that end the generation; the checkpoint's if not given."""
    ignore_eos: bool = False
    """Write on after an end-of-sequence token."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            InvalidArgumentError: Naming the field, its value and what is allowed.
        """
        object.__setattr__(self, "stop", _strings("stop", self.stop))
        object.__setattr__(self, "logit_bias", _biases("logit_bias", self.logit_bias))
        if self.eos_token_ids is not None:
            object.__setattr__(self, "eos_token_ids", _token_ids("eos_token_ids", self.eos_token_ids))
        if self.generation_strategy is not None:
            _choice("generation_strategy", self.generation_strategy, get_args(Strategy))
        _choice("acceptance", self.acceptance, get_args(Acceptance))
        for name, least in (("max_new_tokens", 1), ("top_k", 0), ("no_repeat_ngram_size", 0)):
            self._set(name, whole_number(name, getattr(self, name), least=least))
        ranges = (("num_speculations", 1, None), ("exit_layer", 1, None), ("seed", 0, 2**63 - 1))
        for name, least, most in (*ranges, ("logprobs", 0, MOST_LOGPROBS)):
            if getattr(self, name) is not None:
                self._set(name, whole_number(name, getattr(self, name), least=least, most=most))
        least_penalty = 1 / MAX_PENALTY
        reals: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
            ("temperature", "0 or more", lambda x: x >= 0),
            ("top_p", "above 0 and at most 1", lambda x: 0 < x <= 1),
            ("min_p", "from 0 to 1", lambda x: 0 <= x <= 1),
            (
                "repetition_penalty",
                f"from {least_penalty} to {MAX_PENALTY}",
                lambda x: least_penalty <= x <= MAX_PENALTY,
            ),
            ("frequency_penalty", "from -2 to 2", lambda x: abs(x) <= MOST_COUNT_PENALTY),
            ("presence_penalty", "from -2 to 2", lambda x: abs(x) <= MOST_COUNT_PENALTY),
        )
        for name, allowed, check in reals:
            if name == "temperature" and self.temperature is None:
                continue
            self._set(name, finite_number(name, getattr(self, name), allowed, check))
        if self.generation_strategy == "autoregressive" and self.exit_layer is not None:
            raise InvalidArgumentError(
                f"generation_strategy 'autoregressive' runs all layers, but exit_layer is {self.exit_layer}; use "
                "generation_strategy 'early_exit' to run the first ones only"
            )
        for name in ("do_sample", "block_verification", "ignore_eos"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "do_sample" and value is None):
                raise InvalidArgumentError(f"{name} must be True or False, got {value!r}")

    def _set(self, name: str, value: float) -> None:
        """Keep a number as Python's own kind where it was given as numpy's."""
        object.__setattr__(self, name, value)

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn rather than the likeliest taken."""
        if self.temperature is not None and self.temperature < MIN_TEMPERATURE:
            return False
        if self.do_sample is not None:
            return self.do_sample
        return self.temperature is not None or self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def divisor(self) -> float:
        """What logits are divided by; 0: the likeliest token is taken."""
        if not self.samples:
            return 0.0
        return 1.0 if self.temperature is None else self.temperature

    @property
    def strategy(self) -> Strategy:
        """The strategy that is meant."""
        if self.generation_strategy is not None:
            return self.generation_strategy
        return "adaptive" if self.exit_layer is None and self.num_speculations is None else "self_speculative"

    @property
    def draft_length(self) -> int:
        """Most tokens to draft in a round, where that is fixed."""
        return DEFAULT_DRAFT_LENGTH if self.num_speculations is None else self.num_speculations

    @property
    def speculates(self) -> bool:
        """Whether there are drafts."""
        return self.strategy not in ("autoregressive", "early_exit")


def make_config(config: GenerationConfig | None, options: dict[str, Any]) -> GenerationConfig:
    """A config from a config, keyword arguments, or both (the arguments win).

    Raises:
        InvalidArgumentError: An argument that isn't a field, or a bad value.
    """
    names = [field.name for field in fields(GenerationConfig)]
    unknown = sorted(set(options) - set(names))
    if unknown:
        raise InvalidArgumentError(f"unknown option {unknown[0]!r}; known: {', '.join(names)}")
    if config is not None and not isinstance(config, GenerationConfig):
        raise InvalidArgumentError(f"config must be a GenerationConfig, got {type(config).__name__}")
    return replace(config or GenerationConfig(), **options)


def _choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InvalidArgumentError(f"{name} {value!r} is not known; use {' or '.join(allowed)}")


def _strings(name: str, value: object) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else (None,)
    if not all(isinstance(text, str) and text for text in texts):
        raise InvalidArgumentError(f"{name} must be texts that aren't empty, got {value!r}")
    for text in texts:
        check_text(str(text), f"{name} {text!a}")
    return tuple(str(text) for text in texts)


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    ids = (value,) if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else (None,)
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise InvalidArgumentError(f"{name} must be token ids, got {value!r}")
    return tuple(int(i) for i in ids)


def _biases(name: str, value: object) -> tuple[tuple[int, float], ...]:
    """Pairs by token id; a token that is named twice is refused, since nobody can know what was meant."""
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, Sequence) or not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in pairs):
        raise InvalidArgumentError(f"{name} must map token ids to numbers from -100 to 100, got {value!r}")
    biases: dict[int, float] = {}
    for token, bias in pairs:
        token_id = whole_number(f"{name}: a token id", token, least=0)
        if token_id in biases:
            raise InvalidArgumentError(f"{name} names the token {token_id} twice; give one bias for each token")
        biases[token_id] = finite_number(
            f"{name}: the bias of token {token_id}", bias, "from -100 to 100", lambda x: abs(x) <= MOST_BIAS
        )
    return tuple(sorted(biases.items()))
