"""What adaptive decoding knows about a model from one call to the next."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from layerskip.decoding.adaptive.call_timer import Measuring
from layerskip.decoding.adaptive.cost_cache import read_costs, write_costs
from layerskip.decoding.adaptive.costs import Costs, asks_apart, estimate_costs, measuring
from layerskip.decoding.adaptive.pace import TRIAL_ROUNDS, TRIAL_ROUNDS_OF_SEVERAL, Pace
from layerskip.decoding.adaptive.policy import MOST_DRAFTS, AdaptivePolicy, candidate_exits
from layerskip.decoding.adaptive.rates import PRIOR_RATE, AcceptanceRates
from layerskip.decoding.adaptive.round_times import RoundTimes
from layerskip.model.decoder import Decoder

KNOWN_TOKENS = 24
"""Tokens: the weight of an exit's agreement that was measured elsewhere."""
UNTRAINED_RATE = 0.1
"""The rate that is assumed of exits that nobody trained, until a probe says more: plain steps come first."""
ADAPTER_TOKENS = 64
"""Tokens: the weight of an adapter's agreement in training, where it was measured by confidence too."""

FIRST_CALL_SECONDS = 0.003
"""What the first timed call is expected to take, a cache for it included."""
MOST_ATTEMPTS = 3
"""Times that costs are measured if what comes out can't be true: the machine did something else meanwhile."""


class Tuned(Protocol):
    """What a sweep found best (`checkpoint.tuned.TunedSettings`)."""

    @property
    def agreement(self) -> Mapping[int, float]:
        """By exit, the share of tokens on which it agreed with the last layer."""
        ...

    @property
    def exit_layer(self) -> int:
        """The best exit."""
        ...


class Adapter(Protocol):
    """What training measured of an exit adapter (`checkpoint.loading.adapters.AdapterDescription`)."""

    @property
    def exit_layer(self) -> int:
        """Its exit."""
        ...

    @property
    def by_confidence(self) -> Sequence[tuple[int, int]]:
        """Tokens on which it agreed with the last layer, and all, by class of confidence; empty if unknown."""
        ...


class Experience:
    """Costs by batch size; acceptance rates and corrections of the costs, for greedy decoding and for sampling."""

    def __init__(
        self,
        decoder: Decoder,
        tuned: Tuned | None = None,
        adapters: Sequence[Adapter] = (),
        *,
        trained: bool = True,
        costs: Mapping[int, Costs] | None = None,
    ) -> None:
        """Start empty, or from statistics measured elsewhere, which count until more has been observed here.

        Args:
            decoder: The network.
            tuned: What a sweep has measured; its best exit is followed in any case.
            adapters: What training has measured of the exit adapters.
            trained: Whether the model was trained for early exit; its bare exits begin with a rate that is worth a try.
            costs: By batch size, a power of two; read, or estimated and then measured while tokens are generated, if
                not given.
        """
        self._decoder = decoder
        self._best_exit = () if tuned is None else (tuned.exit_layer,)
        self._agreement = {} if tuned is None else dict(tuned.agreement)
        self._adapters = {adapter.exit_layer: adapter.by_confidence for adapter in adapters}
        self._prior = PRIOR_RATE if trained else UNTRAINED_RATE
        self._costs: dict[int, Costs] = dict(costs or {})
        self._unmeasured: dict[int, _Meter] = {}
        """By batch size whose costs are estimated: what measures them."""
        self._rates: dict[bool, AcceptanceRates] = {}
        self._times: dict[tuple[bool, int], RoundTimes] = {}
        self._paces: dict[tuple[bool, int], Pace] = {}

    def policy(self, *, exit_layer: int | None = None, most_drafts: int | None = None) -> AdaptivePolicy:
        """A policy for one batch, which adds to what is known.

        Args:
            exit_layer: The only exit that may draft.
            most_drafts: Drafts of a round at most.
        """
        candidates = self._decoder.adapted_exits or candidate_exits(self._decoder.num_layers)
        exits = tuple(sorted({*candidates, *self._best_exit}))
        return AdaptivePolicy(
            knowledge=self,
            exits=exits if exit_layer is None else (exit_layer,),
            most_drafts=MOST_DRAFTS if most_drafts is None else most_drafts,
            stops_early=self._decoder.device.type == "cpu" or asks_apart(self._decoder),
        )

    def recall(self, num_rows: int) -> None:
        """Look up the costs of batches of this size, unless they are known; estimate them if nobody has measured."""
        size = self._measured_size(num_rows)
        if size in self._costs:
            return
        # Processes that share the network must not find different things in a cache that others write to.
        costs = read_costs(self._decoder, size) if self._decoder.num_ranks == 1 else None
        if costs is None or not (costs.complete and costs.is_plausible):
            costs = estimate_costs(self._decoder)
        if not costs.complete:
            self._unmeasured[size] = _Meter(work=measuring(self._decoder, size))
        self._costs[size] = costs
        for kind in list(self._times):  # whatever was predicted from another size's costs
            if self._measured_size(kind[1]) == size:
                del self._times[kind]

    def look(self, num_rows: int, budget: float) -> float:
        """Go on measuring the costs of batches of this size, as long as there is time.

        Args:
            num_rows: Rows that run at present.
            budget: Seconds.

        Returns:
            Seconds spent; 0 where nothing is left to measure.
        """
        size = self._measured_size(num_rows)
        meter, spent = self._unmeasured.get(size), 0.0
        while meter is not None and spent + meter.latest < budget:
            started = time.perf_counter()
            costs = meter.advance()
            meter.latest = self.since(started)
            spent += meter.latest
            if costs is not None:
                self._learn(size, costs)
            meter = self._unmeasured.get(size)
        return spent

    def _learn(self, size: int, costs: Costs) -> None:
        meter = self._unmeasured[size]
        if costs.complete and not costs.is_plausible and meter.attempt < MOST_ATTEMPTS:
            costs = replace(costs, complete=False)
            again = measuring(self._decoder, size)
            self._unmeasured[size] = _Meter(work=again, latest=meter.latest, attempt=meter.attempt + 1)
        elif costs.complete:
            del self._unmeasured[size]
        self._costs[size] = costs
        # Half-measured costs would keep a later process from drafting, and so from measuring the rest.
        if self._decoder.num_ranks == 1 and costs.complete and costs.is_plausible:
            write_costs(self._decoder, size, costs)
        for (_, rows), times in self._times.items():
            if self._measured_size(rows) == size:
                times.learn(costs.for_rows(rows) if self._decoder.ragged else costs)

    def _measured_size(self, num_rows: int) -> int:
        """The number of rows whose calls are measured for batches of this size."""
        return 1 if self._decoder.ragged else size_of(num_rows)

    def since(self, started: float) -> float:
        """Seconds since a moment of `time.perf_counter`, the same in all processes that share the network."""
        return self._decoder.stopwatch.since(started)

    def times(self, num_rows: int, *, samples: bool) -> RoundTimes:
        """Predicted seconds of rounds with this many rows.

        Where nothing is padded, they follow from the costs of a single row. Elsewhere, rows leave a batch while it
        runs, and measuring takes too long then: a size whose costs are unknown begins with the costs of the next larger
        one that is known, and corrects them by its own rounds.
        """
        size = size_of(num_rows)
        kind = samples, size
        if kind not in self._times:
            if self._decoder.ragged and 1 in self._costs:
                costs = self._costs[1].for_rows(size)
            else:
                larger = [known for known in self._costs if known >= size]
                costs = self._costs[min(larger) if larger else max(self._costs)]
            self._times[kind] = RoundTimes(costs=costs)
        return self._times[kind]

    def pace(self, num_rows: int, *, samples: bool) -> Pace:
        """Counts of rounds and seconds since the alternatives were evaluated, with this many rows."""
        kind = samples, size_of(num_rows)
        if kind not in self._paces:
            self._paces[kind] = Pace(trial_rounds=TRIAL_ROUNDS if num_rows == 1 else TRIAL_ROUNDS_OF_SEVERAL)
        return self._paces[kind]

    def rates(self, *, samples: bool) -> AcceptanceRates:
        """Acceptance rates of rows that sample, or of rows that don't."""
        if samples not in self._rates:
            self._rates[samples] = AcceptanceRates(prior=self._prior)
            self._rates[samples].observe_exits(
                {exit_: (KNOWN_TOKENS * share, KNOWN_TOKENS) for exit_, share in self._agreement.items()}
            )
            for exit_layer, seen in self._adapters.items():
                self._rates[samples].of_exit(exit_layer).assume(seen, ADAPTER_TOKENS)
        return self._rates[samples]


@dataclass(kw_only=True)
class _Meter:
    """Measures costs call by call."""

    work: Measuring[Costs, Costs]
    attempt: int = 1
    """How many times they have been measured, this time included."""
    latest: float = FIRST_CALL_SECONDS
    """Seconds that the latest call took."""

    def advance(self) -> Costs | None:
        """One more call; costs if they are better known by it."""
        try:
            return next(self.work)
        except StopIteration as end:
            costs: Costs = end.value
            return costs


def size_of(num_rows: int) -> int:
    """The batch size whose costs this many rows have: the next power of two."""
    return 1 << (num_rows - 1).bit_length()
