"""What adaptive decoding knows about a model from one call to the next."""

from collections.abc import Mapping
from typing import Protocol

from layerskip.decoding.adaptive.cost_cache import find_costs
from layerskip.decoding.adaptive.costs import Costs
from layerskip.decoding.adaptive.pace import Pace
from layerskip.decoding.adaptive.policy import MOST_DRAFTS, AdaptivePolicy, candidate_exits
from layerskip.decoding.adaptive.rates import AcceptanceRates
from layerskip.decoding.adaptive.round_times import RoundTimes
from layerskip.model.decoder import Decoder

KNOWN_TOKENS = 24
"""Tokens: the weight of an exit's agreement that was measured elsewhere."""


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


class Experience:
    """Costs by batch size; acceptance rates and corrections of the costs, for greedy decoding and for sampling."""

    def __init__(self, decoder: Decoder, tuned: Tuned | None = None, *, costs: Mapping[int, Costs] | None = None):
        """Start empty, or from statistics measured elsewhere, which count until more has been observed here.

        Args:
            decoder: The network.
            tuned: What a sweep has measured; its best exit is followed in any case.
            costs: By batch size, a power of two; measured when first needed if not given.
        """
        self._decoder = decoder
        self._best_exit = () if tuned is None else (tuned.exit_layer,)
        self._agreement = {} if tuned is None else dict(tuned.agreement)
        self._costs: dict[int, Costs] = dict(costs or {})
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
            stops_early=self._decoder.device.type == "cpu",
        )

    def measure(self, num_rows: int) -> None:
        """Measure the costs of batches of this size, unless they are known."""
        size = size_of(num_rows)
        if size not in self._costs:
            self._costs[size] = find_costs(self._decoder, size)
            for samples in (False, True):  # whatever was predicted from another size's costs
                self._times.pop((samples, size), None)

    def times(self, num_rows: int, *, samples: bool) -> RoundTimes:
        """Predicted seconds of rounds with this many rows.

        Rows leave a batch while it runs, and measuring takes too long then: a size whose costs are unknown begins with
        the costs of the next larger one that is known, and corrects them by its own rounds.
        """
        size = size_of(num_rows)
        kind = samples, size
        if kind not in self._times:
            larger = [known for known in self._costs if known >= size]
            nearest = min(larger) if larger else max(self._costs)
            self._times[kind] = RoundTimes(costs=self._costs[nearest])
        return self._times[kind]

    def pace(self, num_rows: int, *, samples: bool) -> Pace:
        """Counts of rounds and seconds since the alternatives were evaluated, with this many rows."""
        return self._paces.setdefault((samples, size_of(num_rows)), Pace())

    def rates(self, *, samples: bool) -> AcceptanceRates:
        """Acceptance rates of rows that sample, or of rows that don't."""
        if samples not in self._rates:
            self._rates[samples] = AcceptanceRates()
            self._rates[samples].observe_exits(
                {exit_: (KNOWN_TOKENS * share, KNOWN_TOKENS) for exit_, share in self._agreement.items()}
            )
        return self._rates[samples]


def size_of(num_rows: int) -> int:
    """The batch size whose costs this many rows have: the next power of two."""
    return 1 << (num_rows - 1).bit_length()
