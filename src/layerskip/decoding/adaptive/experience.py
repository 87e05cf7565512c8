"""What adaptive decoding knows about a model from one call to the next."""

from collections.abc import Mapping

from layerskip.decoding.adaptive.cost_cache import find_costs
from layerskip.decoding.adaptive.costs import Costs
from layerskip.decoding.adaptive.pace import Pace
from layerskip.decoding.adaptive.policy import MOST_DRAFTS, AdaptivePolicy, candidate_exits
from layerskip.decoding.adaptive.rates import AcceptanceRates
from layerskip.decoding.adaptive.round_times import RoundTimes
from layerskip.model.decoder import Decoder

KNOWN_TOKENS = 24
"""Tokens that an exit's agreement elsewhere stands for."""


class Experience:
    """Costs by batch size; acceptance and corrections of the costs, for greedy decoding and for sampling."""

    def __init__(self, agreement: Mapping[int, float] | None = None, best_exit: int | None = None) -> None:
        """Know nothing, or what was seen elsewhere, which decides until more was seen here.

        Args:
            agreement: By exit, share of tokens that it drafted right.
            best_exit: An exit to follow in any case.
        """
        self._best_exit = () if best_exit is None else (best_exit,)
        self._agreement = dict(agreement or {})
        self._costs: dict[int, Costs] = {}
        self._rates: dict[bool, AcceptanceRates] = {}
        self._times: dict[tuple[bool, int], RoundTimes] = {}
        self._paces: dict[tuple[bool, int], Pace] = {}

    def policy(
        self,
        decoder: Decoder,
        num_rows: int,
        *,
        samples: bool,
        exit_layer: int | None = None,
        most_drafts: int | None = None,
    ) -> AdaptivePolicy:
        """A policy for one batch, which adds to what is known; costs are found when a size is first met.

        Args:
            decoder: The network.
            num_rows: B.
            samples: Whether tokens are drawn, or the likeliest taken.
            exit_layer: The only exit that may draft.
            most_drafts: Most drafts of a round.
        """
        size = 1 << (num_rows - 1).bit_length()  # sizes up to the next power of two share their costs
        if size not in self._costs:
            self._costs[size] = find_costs(decoder, size)
        kind = samples, size
        if kind not in self._times:
            self._times[kind] = RoundTimes(costs=self._costs[size])
        if samples not in self._rates:
            self._rates[samples] = AcceptanceRates()
            self._rates[samples].observe_exits(
                {exit_: (KNOWN_TOKENS * share, KNOWN_TOKENS) for exit_, share in self._agreement.items()}
            )
        return AdaptivePolicy(
            times=self._times[kind],
            exits=self._exits(decoder.num_layers) if exit_layer is None else (exit_layer,),
            rates=self._rates[samples],
            pace=self._paces.setdefault(kind, Pace()),
            most_drafts=MOST_DRAFTS if most_drafts is None else most_drafts,
            stops_early=decoder.device.type == "cpu",
        )

    def _exits(self, num_layers: int) -> tuple[int, ...]:
        return tuple(sorted({*candidate_exits(num_layers), *self._best_exit}))
