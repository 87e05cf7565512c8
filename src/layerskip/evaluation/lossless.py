"""Proof that speculation changes nothing: decode both ways, and teacher-force every divergence.

In floating point a product of several rows and one of a single row may round differently, so that two tokens of nearly
the same score can swap places. Each divergence is therefore examined: a *near-tie* is one in which either token wins
when logits move by no more than a stated tolerance; anything else is an *error*.

Shapes: V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.noise import Purpose, gumbel, make_key
from layerskip.decoding.sampling import Sampler
from layerskip.decoding.stream import GenerationResult
from layerskip.errors import InvalidArgumentError
from layerskip.language_model import LanguageModel

Mode = Literal["greedy", "coupled"]

LOGIT_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-1}
"""How far rounding may move a logit, by dtype of the network."""


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The first token at which two texts of one prompt differ."""

    prompt: int
    """The prompt's place among those checked."""
    position: int
    """Index of the token in the output."""
    expected: int | None
    """Token of autoregressive decoding; None if its text had ended."""
    actual: int | None
    """Token of self-speculative decoding; None if its text had ended."""
    gap: float | None
    """By how much the better of the two is ahead, in logits after processing; None where one is filtered out."""
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
    """Prompts whose first difference is none."""
    tokens: int = 0
    """Tokens written self-speculatively."""
    drafted: int = 0
    accepted: int = 0
    divergences: list[Divergence] = field(default_factory=list)

    def count(self, result: GenerationResult) -> None:
        """Add a result's figures."""
        self.tokens += result.stats.tokens
        self.drafted += result.stats.drafted
        self.accepted += result.stats.accepted

    def add(self, divergence: Divergence | None) -> None:
        """Count a prompt as equal, near-tie or error."""
        if divergence is None:
            self.equal += 1
            return
        self.divergences.append(divergence)
        self.near_ties += divergence.near_tie
        self.errors += not divergence.near_tie


@dataclass(frozen=True, kw_only=True)
class LosslessReport:
    """Comparison over all settings."""

    settings: list[SettingReport]
    tolerance: float
    """In logits."""
    num_prompts: int

    @property
    def errors(self) -> int:
        """Errors of all settings."""
        return sum(setting.errors for setting in self.settings)


def verify_lossless(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[tuple[int, int]],
    *,
    modes: Sequence[Mode] = ("greedy", "coupled"),
    config: GenerationConfig | None = None,
    batch_size: int = 1,
    tolerance: float | None = None,
    on_progress: Callable[[str, int], None] | None = None,
) -> LosslessReport:
    """Decode prompts autoregressively and self-speculatively, and compare token by token.

    Args:
        lm: The model.
        prompts: Token ids of each prompt.
        settings: Pairs of exit layer and draft length.
        modes: Greedy, coupled sampling, or both.
        config: Length, processors and seed; `coupled` samples with its temperature, top-k, top-p and min-p.
        batch_size: Prompts to decode together.
        tolerance: Of near-ties, in logits; `LOGIT_TOLERANCE` if not given.
        on_progress: Called with what is under way, and the number of prompts just finished.

    Raises:
        InvalidArgumentError: Nothing to check, or an exit layer that the network doesn't have.
    """
    if not prompts or not settings or not modes or batch_size < 1:
        raise InvalidArgumentError("verification needs at least one prompt, setting and mode, and a batch size above 0")
    for exit_layer, num_speculations in settings:
        lm.config.check_exit_layer(exit_layer)
        GenerationConfig(num_speculations=num_speculations)
    tolerance = LOGIT_TOLERANCE[lm.decoder.dtype] if tolerance is None else tolerance
    base = config or GenerationConfig(temperature=0.8, top_p=0.95)
    base = replace(base, acceptance="coupled", seed=0 if base.seed is None else base.seed, stop=())
    progress = on_progress or (lambda what, num_prompts: None)
    reports = []
    for mode in modes:
        moded = replace(base, do_sample=mode == "coupled", generation_strategy="autoregressive", exit_layer=None)
        results = _decode(lm, prompts, moded, batch_size, partial(progress, f"{mode}, plain"))
        expected = [result.token_ids for result in results]
        for exit_layer, num_speculations in settings:
            report = SettingReport(exit_layer=exit_layer, num_speculations=num_speculations, mode=mode)
            name = f"{mode}, exit {exit_layer}, {num_speculations} drafts"
            drafting = replace(
                moded,
                generation_strategy="self_speculative",
                exit_layer=exit_layer,
                num_speculations=num_speculations,
            )
            results = _decode(lm, prompts, drafting, batch_size, partial(progress, name))
            for index, result in enumerate(results):
                report.count(result)
                report.add(_compare(lm, moded, index, prompts[index], expected[index], result.token_ids, tolerance))
            reports.append(report)
    return LosslessReport(settings=reports, tolerance=tolerance, num_prompts=len(prompts))


def _decode(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    batch_size: int,
    on_batch: Callable[[int], None],
) -> list[GenerationResult]:
    results: list[GenerationResult] = []
    for start in range(0, len(prompts), batch_size):
        batch = lm.generate([list(prompt) for prompt in prompts[start : start + batch_size]], config)
        results += batch
        on_batch(len(batch))
    return results


def _compare(
    lm: LanguageModel,
    config: GenerationConfig,
    index: int,
    prompt: Sequence[int],
    expected: Sequence[int],
    actual: Sequence[int],
    tolerance: float,
) -> Divergence | None:
    """The first difference of two outputs, judged; None if there is none."""
    if list(expected) == list(actual):
        return None
    position = next((i for i, (a, b) in enumerate(zip(expected, actual, strict=False)) if a != b), None)
    if position is None:  # one text ends where the other goes on: no rounding explains that
        position = min(len(expected), len(actual))
        ours = actual[position] if position < len(actual) else None
        theirs = expected[position] if position < len(expected) else None
        return Divergence(prompt=index, position=position, expected=theirs, actual=ours, gap=None, near_tie=False)
    context = [*prompt, *expected[:position]]
    tokens = (expected[position], actual[position])
    gap, near_tie = judge(lm, config, context, tokens, tolerance)
    return Divergence(prompt=index, position=position, expected=tokens[0], actual=tokens[1], gap=gap, near_tie=near_tie)


def judge(
    lm: LanguageModel, config: GenerationConfig, context: Sequence[int], tokens: tuple[int, int], tolerance: float
) -> tuple[float | None, bool]:
    """Teacher-force a context and ask whether two tokens are nearly tied as its continuation.

    They are if each of them wins in some network whose logits differ from these by at most the tolerance. Three are
    tried: this one; one that favours the token, which may let it pass top-k, top-p or min-p; and one that is against
    the other token, which may keep that out.

    Args:
        lm: The model.
        config: How tokens were chosen, with its seed.
        context: Token ids before the divergence.
        tokens: The two tokens.
        tolerance: In logits.

    Returns:
        Distance of the two scores (None where one is filtered out), and whether it is a near-tie.
    """
    sampler = Sampler(config)
    logits = lm.logits(context)[-1].cpu()
    noise = torch.zeros_like(logits)
    if sampler.samples:
        key = make_key(config.seed or 0, Purpose.TARGET, len(context))
        noise = gumbel([[key]], len(logits), logits.device)[0, 0]

    def scores(of: Tensor) -> Tensor:
        return sampler.scores(of.view(1, 1, -1), [[list(context)]])[0, 0] + noise

    plain = scores(logits)
    scale = 1.0 / config.temperature if sampler.samples else 1.0
    slack = 2 * tolerance * scale * max(config.repetition_penalty, 1.0 / config.repetition_penalty)

    def shifted(token: int, shift: float) -> Tensor:
        """Scores where the filters see `token` and all below it moved by `shift`, and all above it the other way."""
        shifts = torch.where(logits > logits[token], -shift, shift)
        return scores(logits + shifts) - shifts * scale

    def can_win(token: int, other: int) -> bool:
        cases = (plain, shifted(token, tolerance), shifted(other, -tolerance))
        return any(bool(case[token] >= case.max() - slack) for case in cases)

    gap = float((plain[tokens[0]] - plain[tokens[1]]).abs())
    near_tie = can_win(*tokens) and can_win(*tokens[::-1])
    return gap if math.isfinite(gap) else None, near_tie
