"""What a verification compares, and how it judges a difference: by teacher-forcing both texts up to it.

In floating point a product of several rows and one of a single row may round differently, so that two tokens of nearly
the same score can swap places. Each divergence is therefore examined: a *near-tie* is one in which either token wins
when logits move by no more than a stated tolerance; anything else is an *error*.

Shapes: V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.sampler import Sampler
from layerskip.errors import InvalidArgumentError
from layerskip.evaluation.setting import Setting
from layerskip.language_model import LanguageModel
from layerskip.model.choosing.noise import Purpose, gumbel, make_key

Mode = Literal["greedy", "coupled"]

LOGIT_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-1}
"""How far rounding may move a logit, by dtype of the network."""
NOTHING_TO_VERIFY = "verification needs at least one prompt, setting and mode, and a batch size above 0"


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The first token at which two texts of one prompt differ."""

    prompt: int
    """The prompt's place among those verified."""
    position: int
    """Index of the token in the output."""
    expected: int | None
    """Token of autoregressive decoding; None if its text had ended."""
    actual: int | None
    """Token of self-speculative decoding; None if its text had ended."""
    gap: float | None
    """By how much the better of the two is ahead, in logits after processing; None where one is filtered out."""
    top2_gap: float | None
    """By how much the best token of all is ahead of the second best; None where a text ends, or filters leave one."""
    near_tie: bool


@dataclass(kw_only=True)
class SettingReport:
    """Comparison over all prompts for one exit layer, draft length and mode."""

    exit_layer: int
    num_speculations: int
    mode: Mode
    equal: int = 0
    """Prompts with the same tokens."""
    near_ties: int = 0
    """Prompts whose first difference is a near-tie."""
    errors: int = 0
    """Prompts whose first difference is not a near-tie."""
    tokens: int = 0
    """Tokens generated self-speculatively."""
    drafted: int = 0
    accepted: int = 0
    divergences: list[Divergence] = field(default_factory=list)

    def count(self, tokens: int, drafted: int, accepted: int) -> None:
        """Add the figures of a text."""
        self.tokens += tokens
        self.drafted += drafted
        self.accepted += accepted

    def add(self, divergence: Divergence | None) -> None:
        """Count a prompt as equal, near-tie or error."""
        if divergence is None:
            self.equal += 1
            return
        self.divergences.append(divergence)
        self.near_ties += divergence.near_tie
        self.errors += not divergence.near_tie


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Comparison over all settings."""

    settings: list[SettingReport]
    tolerance: float
    """In logits."""
    num_prompts: int

    @property
    def errors(self) -> int:
        """Errors of all settings."""
        return sum(setting.errors for setting in self.settings)


@dataclass(frozen=True, kw_only=True)
class VerifyPlan:
    """What is compared; from `make_plan`, which checks that it is possible."""

    settings: tuple[Setting, ...]
    modes: tuple[Mode, ...]
    base: GenerationConfig
    """What all modes and settings share."""
    batch_size: int
    tolerance: float
    """In logits."""

    def autoregressive(self, mode: Mode) -> GenerationConfig:
        """How the texts are generated that others are compared with."""
        return replace(self.base, do_sample=mode == "coupled", generation_strategy="autoregressive", exit_layer=None)

    def drafting(self, mode: Mode, setting: Setting) -> GenerationConfig:
        """How a setting generates them."""
        return replace(self.autoregressive(mode), generation_strategy="self_speculative", **setting._asdict())


def make_plan(
    lm: LanguageModel,
    settings: Sequence[tuple[int, int]],
    *,
    modes: Sequence[Mode] = ("greedy", "coupled"),
    config: GenerationConfig | None = None,
    batch_size: int = 1,
    tolerance: float | None = None,
) -> VerifyPlan:
    """Check what is to be compared, and fill in what is open.

    Args:
        lm: The model.
        settings: Pairs of exit layer and draft length.
        modes: Greedy, coupled sampling, or both.
        config: Length, processors and seed; `coupled` samples with its temperature, top-k, top-p and min-p.
        batch_size: Prompts to decode together.
        tolerance: Of near-ties, in logits; `LOGIT_TOLERANCE` if not given.

    Raises:
        InvalidArgumentError: Nothing to check, or an exit layer that the network doesn't have.
    """
    if not settings or not modes or batch_size < 1:
        raise InvalidArgumentError(NOTHING_TO_VERIFY)
    for exit_layer, num_speculations in settings:
        lm.config.check_exit_layer(exit_layer)
        GenerationConfig(num_speculations=num_speculations)
    base = config or GenerationConfig(temperature=0.8, top_p=0.95)
    return VerifyPlan(
        settings=tuple(Setting(*pair) for pair in settings),
        modes=tuple(modes),
        base=replace(base, acceptance="coupled", seed=0 if base.seed is None else base.seed, stop=()),
        batch_size=batch_size,
        tolerance=LOGIT_TOLERANCE[lm.decoder.dtype] if tolerance is None else tolerance,
    )


def describe(mode: Mode, setting: Setting | None = None) -> str:
    """What is under way, for people: decoding with a setting, or without drafts."""
    return (
        f"{mode}, plain" if setting is None else f"{mode}, exit {setting.exit_layer}, {setting.num_speculations} drafts"
    )


def compare(
    lm: LanguageModel,
    config: GenerationConfig,
    index: int,
    prompt: Sequence[int],
    expected: Sequence[int],
    actual: Sequence[int],
    tolerance: float,
) -> Divergence | None:
    """The first difference of two outputs, judged; None if there is none.

    Args:
        lm: The model.
        config: How `expected` was chosen, with its seed.
        index: The prompt's place among those verified.
        prompt: Token ids of the prompt.
        expected: Token ids that autoregressive decoding generated after it.
        actual: Token ids that self-speculative decoding generated.
        tolerance: Of near-ties, in logits.
    """
    if list(expected) == list(actual):
        return None
    position = next((i for i, (a, b) in enumerate(zip(expected, actual, strict=False)) if a != b), None)
    if position is None:  # one text ends where the other goes on: no rounding explains that
        position = min(len(expected), len(actual))
        return Divergence(
            prompt=index,
            position=position,
            expected=expected[position] if position < len(expected) else None,
            actual=actual[position] if position < len(actual) else None,
            gap=None,
            top2_gap=None,
            near_tie=False,
        )
    tokens = (expected[position], actual[position])
    scores = _Scores(lm, config, [*prompt, *expected[:position]])
    return Divergence(
        prompt=index,
        position=position,
        expected=tokens[0],
        actual=tokens[1],
        gap=scores.gap(*tokens),
        top2_gap=scores.top2_gap(),
        near_tie=scores.near_tie(tokens, tolerance),
    )


class _Scores:
    """Scores of all tokens as a context's continuation; the token with the highest score is chosen."""

    def __init__(self, lm: LanguageModel, config: GenerationConfig, context: Sequence[int]) -> None:
        self._config, self._context = config, list(context)
        self._sampler = Sampler([config], [config.seed or 0])
        self._logits = lm.logits(context)[-1].cpu()
        self._noise = torch.zeros_like(self._logits)
        if config.samples:
            key = make_key(config.seed or 0, Purpose.TARGET, len(context))
            self._noise = gumbel([[key]], len(self._logits), self._logits.device)[0, 0]
        self._scale = 1.0 / config.divisor if config.samples else 1.0
        self._plain = self._of(self._logits)

    def gap(self, token: int, other: int) -> float | None:
        """Distance of two tokens; None where one is filtered out."""
        return _finite(float((self._plain[token] - self._plain[other]).abs()))

    def top2_gap(self) -> float | None:
        """Distance of the best two tokens; None where the filters leave one."""
        best, second = self._plain.topk(2).values.tolist()
        return _finite(best - second)

    def near_tie(self, tokens: tuple[int, int], tolerance: float) -> bool:
        """Whether each of two tokens wins in some network whose logits differ from these by at most the tolerance.

        Three networks are tried: this one; one that favours the token, which may let it pass top-k, top-p or min-p; and
        one that is against the other token, which may keep that out.
        """
        return self._can_win(*tokens, tolerance) and self._can_win(*tokens[::-1], tolerance)

    def _can_win(self, token: int, other: int, tolerance: float) -> bool:
        penalty = self._config.repetition_penalty
        slack = 2 * tolerance * self._scale * max(penalty, 1.0 / penalty)
        cases = (self._plain, self._shifted(token, tolerance), self._shifted(other, -tolerance))
        return any(bool(case[token] >= case.max() - slack) for case in cases)

    def _shifted(self, token: int, shift: float) -> Tensor:
        """Scores where the filters see `token` and all below it moved by `shift`, and all above it the other way."""
        shifts = torch.where(self._logits > self._logits[token], -shift, shift)
        return self._of(self._logits + shifts) - shifts * self._scale

    def _of(self, logits: Tensor) -> Tensor:
        return self._sampler.scores(logits.view(1, 1, -1), [[self._context]])[0, 0] + self._noise


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
