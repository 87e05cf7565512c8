"""Rows that are decoded together: one plan, one block of the network, each row by its own rules."""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Literal

from torch import Tensor

from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.ngrams.index import Match
from layerskip.decoding.policy import Plan, Policy, RoundResult
from layerskip.decoding.request import choose_exit_layer, depth_of
from layerskip.decoding.row import Row
from layerskip.decoding.rules.guide import Guide, Masks
from layerskip.decoding.rules.penalties import adjusts
from layerskip.decoding.sampler import Sampler
from layerskip.model.cache import KVCache
from layerskip.model.decoder import Decoder

Needs = Literal["tokens", "contexts", "distributions", "distributions one by one"]
"""What the rows of a batch need of the network: tokens only; logits, for penalties, biases, constraints or
log-probabilities; or distributions, because drafts are accepted by rejection sampling, as a block or one by one."""


def needs_of(config: GenerationConfig, *, constrained: bool = False) -> Needs:
    """What a row with these rules needs, with or without a constraint."""
    if config.speculates and config.samples and config.acceptance == "rejection":
        return "distributions" if config.block_verification else "distributions one by one"
    return "contexts" if constrained or adjusts(config) or config.logprobs is not None else "tokens"


def batch_key(config: GenerationConfig, decoder: Decoder, *, constrained: bool = False) -> Hashable:
    """What rows must have in common to be decoded together: what they need, and the options of their strategy."""
    strategy, needs = config.strategy, needs_of(config, constrained=constrained)
    match strategy:
        case "autoregressive" | "early_exit":
            return needs, "plain", depth_of(config, decoder)
        case "self_speculative":
            return needs, strategy, choose_exit_layer(config, decoder), config.draft_length
        case "ngram":
            return needs, strategy, config.draft_length
        case _:
            return needs, strategy, config.exit_layer, config.num_speculations


class Batch:
    """Rows that run in the same rounds. Row r of the cache view belongs to `rows[r]`, and holds all its tokens but one.

    Everything that is put together from the rows is kept until rows come or go.
    """

    def __init__(self, decoder: Decoder, key: Hashable, needs: Needs, depth: int, policy: Policy | None) -> None:
        """Begin without rows.

        Args:
            decoder: The network.
            key: What the rows have in common.
            needs: What they need of the network.
            depth: Layers that run over every token in the end.
            policy: Plans the rounds; None for rows that take one step after the other.
        """
        self.decoder, self.key, self.needs, self.depth, self.policy = decoder, key, needs, depth, policy
        self.rows: list[Row] = []
        self.prepared = False
        """Whether the policy has measured what it needs."""
        self.resting: Plan | None = None
        """A plan of several steps that is under way."""
        self.num_steps = 0
        """Steps of it that were taken."""
        self.first_step: RoundResult | None = None
        """What the first of them gave."""
        self.step_seconds: list[float] = []
        """Seconds of those that settled."""
        self._cache: KVCache | None = None
        self._placed: list[Row] = []

    @property
    def cache(self) -> KVCache:
        """The rows' slots."""
        assert self._cache is not None
        return self._cache

    def place(self, cache: KVCache) -> None:
        """Take up another place in the cache, after rows have come or gone, here or elsewhere."""
        self._cache = cache
        if self._placed == self.rows:
            return
        self._placed = list(self.rows)
        for name in ("seeds", "samples", "sampler", "ends", "stops", "guides"):
            self.__dict__.pop(name, None)
        self.end_rest()

    def end_rest(self) -> None:
        """Tell the policy of the steps that were taken; it is asked again from here on."""
        if self.resting is not None and self.policy is not None and self.first_step is not None:
            self.policy.observe(self.resting, replace(self.first_step, step_seconds=tuple(self.step_seconds)))
        self.resting, self.first_step, self.num_steps, self.step_seconds = None, None, 0, []

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.rows)

    @property
    def remaining(self) -> int:
        """Tokens that the row with the most room may still generate."""
        return max(row.remaining for row in self.rows)

    @cached_property
    def seeds(self) -> list[int]:
        """Seed of each row."""
        return [row.request.seed for row in self.rows]

    @cached_property
    def samples(self) -> list[bool]:
        """For each row, whether its tokens are drawn."""
        return [row.request.config.samples for row in self.rows]

    @cached_property
    def sampler(self) -> Sampler:
        """The rows' distributions, and draws from them."""
        return self._make_sampler(self.rows)

    @cached_property
    def guides(self) -> list[Guide | None] | None:
        """The constraint of each row; None where no row has one."""
        guides = [row.guide for row in self.rows]
        return guides if any(guide is not None for guide in guides) else None

    @property
    def forces(self) -> bool:
        """Whether a constraint leaves some row no choice of its next token."""
        return any(guide is not None and guide.at().forced is not None for guide in self.guides or ())

    @cached_property
    def ends(self) -> list[frozenset[int]]:
        """Tokens that end each row."""
        return [row.request.eos_token_ids for row in self.rows]

    @cached_property
    def stops(self) -> bool:
        """Whether text may end some row, which is looked for after every round."""
        return any(row.request.config.stop for row in self.rows)

    def sampler_of(self, places: Sequence[int]) -> Sampler:
        """The sampler of some of the rows."""
        if len(places) == self.num_rows:
            return self.sampler
        return self._make_sampler([self.rows[place] for place in places])

    def _make_sampler(self, rows: Sequence[Row]) -> Sampler:
        requests = [row.request for row in rows]
        return Sampler(
            [request.config for request in requests],
            [request.seed for request in requests],
            self.decoder.vocabulary,
            [len(request.tokens) for request in requests],
        )

    @property
    def by_distribution(self) -> bool:
        """Whether drafts are accepted by rejection sampling, and not by comparing tokens."""
        return self.needs.startswith("distributions")

    @property
    def context(self) -> int:
        """Tokens of all rows together."""
        return sum(len(row.tokens) for row in self.rows)

    @property
    def histories(self) -> list[tuple[float, float]]:
        """For each row, its latest drafts by early layers: accepted ones, and all up to the first that wasn't."""
        return [row.history for row in self.rows]

    @property
    def last_tokens(self) -> list[int]:
        """The last token of each row, on the host."""
        return [row.tokens[-1] for row in self.rows]

    def pending(self) -> Tensor:
        """The last token of each row, [B, 1], on the device."""
        return self.decoder.pending(self.last_tokens)

    def matches(self) -> list[Match | None]:
        """For each row, what followed its last tokens where they occurred before."""
        return [row.match() for row in self.rows]

    def draft_lengths(self, plan: Plan) -> list[int]:
        """Drafts that each row can use: no more than it may still generate, less the token that verification adds."""
        planned = self.planned_lengths(plan)
        return [min(length, row.remaining - 1) for length, row in zip(planned, self.rows, strict=True)]

    def planned_lengths(self, plan: Plan) -> Sequence[int]:
        """Drafts that a plan gives each row at most."""
        return plan.lengths or (plan.num_speculations,) * self.num_rows

    def masks(self, drafts: Sequence[Sequence[int]] | None = None) -> Masks | None:
        """What may follow each row's tokens and 0, 1, ... of its drafts; None if everything may."""
        if self.guides is None:
            return None
        drafts = [()] * self.num_rows if drafts is None else drafts
        return [
            guide.along(draft) if guide is not None else () for guide, draft in zip(self.guides, drafts, strict=True)
        ]

    def contexts(self, drafts: Sequence[Sequence[int]] | None = None) -> list[list[list[int]]] | None:
        """Tokens before each position that follows a row's tokens and 0, 1, ... of its drafts; None if not needed."""
        if not self.sampler.needs_context:
            return None
        if drafts is None:
            return [[row.tokens] for row in self.rows]
        return [
            [[*row.tokens, *draft[:i]] for i in range(len(draft) + 1)]
            for row, draft in zip(self.rows, drafts, strict=True)
        ]
