"""Statistical test that rejection sampling draws from the target's distribution, on a real model.

Two drafts are verified for one prompt, many times with different seeds. The first two tokens of the outcome must be
distributed as two tokens drawn from the target, whose exact joint distribution is computed. Drafting, acceptance and
correction are the engine's own functions; only the network's logits, which don't depend on the seed, are reused.

Shapes: N draws, C contexts, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.rounds.verifying import draw_accepted
from layerskip.decoding.sampler import Sampler
from layerskip.errors import InvalidArgumentError
from layerskip.language_model import LanguageModel
from layerskip.model.choosing.noise import Purpose
from layerskip.model.positions import ValueSource

LEAST_EXPECTED = 5.0
"""Cells with fewer expected draws are pooled, as a chi-square test needs."""
CHUNK_ELEMENTS = 2**24
"""Probabilities to hold at a time."""

Accept = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class DistributionReport:
    """Outcome of one chi-square test."""

    exit_layer: int
    acceptance: str
    """`rejection`, or `rejection, block`."""
    draws: int
    acceptance_rate: float
    """Accepted drafts / drafts."""
    cells: int
    """Pairs of tokens compared, the pooled rest included."""
    chi_square: float
    p_value: float
    """Chance of a deviation at least as large if the distributions are equal."""
    passed: bool


def verify_distribution(
    lm: LanguageModel,
    prompt: Sequence[int],
    config: GenerationConfig,
    exit_layer: int,
    *,
    block: bool,
    draws: int = 50_000,
    significance: float = 0.001,
    accept: Accept = draw_accepted,
) -> DistributionReport:
    """Draw two tokens after a prompt many times, with drafts from one exit, and test their distribution.

    Args:
        lm: The model.
        prompt: Token ids.
        config: Temperature and filters; must sample.
        exit_layer: Layers that draft.
        block: Block verification, or one draft after the other.
        draws: N.
        significance: The test fails below this p-value.
        accept: What draws from drafts; the engine's own, unless the test itself is to be tested.

    Raises:
        InvalidArgumentError: A config that doesn't sample, or too few draws.
    """
    sampler = Sampler([config], [0])
    if not config.samples:
        raise InvalidArgumentError("the distribution test needs sampling: set a temperature above 0")
    if draws < 1000:
        raise InvalidArgumentError(f"the distribution test needs at least 1000 draws, got {draws}")
    lm.config.check_exit_layer(exit_layer)
    model = _Model(lm, sampler, list(prompt), exit_layer)
    pairs, accepted = _draw_pairs(model, config, draws, block, accept)
    chi_square, cells = _chi_square(model, pairs, draws)
    p_value = float(torch.special.gammaincc(torch.tensor((cells - 1) / 2), torch.tensor(chi_square / 2)))
    return DistributionReport(
        exit_layer=exit_layer,
        acceptance="rejection, block" if block else "rejection",
        draws=draws,
        acceptance_rate=accepted / (2 * draws),
        cells=cells,
        chi_square=chi_square,
        p_value=p_value,
        passed=p_value > significance,
    )


class _Model:
    """Draft and target distributions after a prompt and after one more token, each computed once."""

    def __init__(self, lm: LanguageModel, sampler: Sampler, prompt: list[int], exit_layer: int) -> None:
        self.length = len(prompt)
        self._lm, self._sampler, self._prompt, self._exit = lm, sampler, prompt, exit_layer
        self._cache: dict[int | None, tuple[Tensor, Tensor]] = {}
        self._root = lm.decoder.new_cache(1, len(prompt) + 1)
        self._run(None, prompt, 0)
        self._root.commit(0, len(prompt))

    def draft(self, token: int | None) -> Tensor:
        """Scores [V] of the draft after the prompt and perhaps one token."""
        return self._get(token)[0]

    def target(self, token: int | None) -> Tensor:
        """Scores [V] of the target after the prompt and perhaps one token."""
        return self._get(token)[1]

    def _get(self, token: int | None) -> tuple[Tensor, Tensor]:
        if token not in self._cache:
            assert token is not None
            self._run(token, [token], self.length)
        return self._cache[token]

    @torch.inference_mode()
    def _run(self, key: int | None, tokens: list[int], start: int) -> None:
        decoder = self._lm.decoder
        positions = decoder.place(self._root, [start], len(tokens))
        hidden = decoder.embed(torch.tensor([tokens], device=decoder.device))
        early = decoder.run_layers(hidden, positions, self._root, 0, self._exit)
        late = decoder.run_layers(early, positions, self._root, self._exit, decoder.num_layers)
        read = decoder.adapt(early, positions, self._root, self._exit, ValueSource.BEFORE)
        logits = [decoder.unembed(read[:, -1:], self._exit), decoder.unembed(late[:, -1:])]
        context = [[self._prompt if key is None else [*self._prompt, key]]]
        scores = [self._sampler.scores(each, context)[0, 0].cpu() for each in logits]
        self._cache[key] = (scores[0], scores[1])


@torch.inference_mode()
def _draw_pairs(model: _Model, config: GenerationConfig, draws: int, block: bool, accept: Accept) -> tuple[Tensor, int]:
    """First two tokens of each draw [N, 2], and the number of accepted drafts."""
    root_draft, root_target = model.draft(None), model.target(None)
    size = max(1, CHUNK_ELEMENTS // len(root_draft) // 4)
    pairs, total = [], 0
    for start in range(0, draws, size):
        seeds = list(range(start, min(start + size, draws)))
        n, first = len(seeds), [model.length] * len(seeds)
        sampler = Sampler([config] * n, seeds)
        counters = [0] * n
        one = sampler.choose(root_draft.expand(n, 1, -1), first, Purpose.DRAFT, counters)
        drafts = torch.stack([model.draft(token) for (token,) in one.tolist()])
        targets = torch.stack([model.target(token) for (token,) in one.tolist()])
        second = [p + 1 for p in first]
        two = sampler.choose(drafts.unsqueeze(1), second, Purpose.DRAFT, counters)
        draft_probs = torch.stack((root_draft.expand(n, -1), drafts), 1).softmax(-1)
        # The token after two accepted drafts isn't looked at: any distribution does for it.
        target_probs = torch.stack((root_target.expand(n, -1), targets, targets), 1).softmax(-1)
        result = accept(
            sampler,
            torch.cat((one, two), 1),
            draft_probs,
            target_probs,
            num_drafts=torch.full((n,), 2),
            seeds=seeds,
            first=first,
            counters=counters,
            block=block,
        )
        pairs.append(_first_two(model, config, result, seeds))
        total += int(result[:, 2].sum())
    return torch.cat(pairs), total


def _first_two(model: _Model, config: GenerationConfig, result: Tensor, seeds: Sequence[int]) -> Tensor:
    """Output tokens 1 and 2 of rounds [N, 4]; a round that ends after one is followed by a plain step."""
    outputs = []
    for row, (one, two, accepted, token) in enumerate(result.tolist()):
        if accepted == 0:
            scores = model.target(token).view(1, 1, -1)
            sampler = Sampler([config], [seeds[row]])
            following = sampler.choose(scores, [model.length + 1], Purpose.TARGET, [1])
            outputs.append((token, int(following)))
        else:
            outputs.append((one, two if accepted == 2 else token))
    return torch.tensor(outputs)


def _chi_square(model: _Model, pairs: Tensor, draws: int) -> tuple[float, int]:
    """Statistic against the target's exact distribution of pairs, and the number of cells."""
    vocab_size = len(model.target(None))
    seen, times = (pairs[:, 0] * vocab_size + pairs[:, 1]).unique(return_counts=True)  # type: ignore[no-untyped-call]
    counts = dict(zip(seen.tolist(), times.tolist(), strict=True))
    root = model.target(None).double().softmax(-1) * draws
    statistic, cells, rest_expected, rest_observed = 0.0, 0, float(draws), draws
    for first in (root >= LEAST_EXPECTED).nonzero().flatten().tolist():
        expected = model.target(first).double().softmax(-1) * root[first]
        for second in (expected >= LEAST_EXPECTED).nonzero().flatten().tolist():
            count, mean = counts.get(first * vocab_size + second, 0), float(expected[second])
            statistic += (count - mean) ** 2 / mean
            cells, rest_expected, rest_observed = cells + 1, rest_expected - mean, rest_observed - count
    if rest_expected >= LEAST_EXPECTED:
        return statistic + (rest_observed - rest_expected) ** 2 / rest_expected, cells + 1
    # Too little is left for a cell of its own; draws outside the support still show, against at least one expected.
    return statistic + (rest_observed - rest_expected) ** 2 / max(rest_expected, 1.0), cells + 1
