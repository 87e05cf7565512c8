"""What adaptive decoding knows about a model from one call to the next."""

from layerskip.decoding.acceptance import AcceptanceRates
from layerskip.decoding.costs import Costs, measure_costs
from layerskip.decoding.policy import AdaptivePolicy, Drafter, candidate_exits
from layerskip.model.decoder import Decoder


class Experience:
    """Costs by batch size; acceptance and corrections of the costs, for greedy decoding and for sampling."""

    def __init__(self) -> None:
        self._costs: dict[int, Costs] = {}
        self._rates: dict[bool, AcceptanceRates] = {}
        self._corrections: dict[tuple[bool, int], dict[Drafter, float]] = {}

    def policy(self, decoder: Decoder, num_rows: int, *, samples: bool) -> AdaptivePolicy:
        """A policy for one batch, which adds to what is known; costs are measured when a size is first met."""
        size = 1 << (num_rows - 1).bit_length()  # sizes up to the next power of two share their costs
        if size not in self._costs:
            self._costs[size] = measure_costs(decoder, size)
        return AdaptivePolicy(
            costs=self._costs[size],
            exits=candidate_exits(decoder.num_layers),
            rates=self._rates.setdefault(samples, AcceptanceRates()),
            corrections=self._corrections.setdefault((samples, size), {}),
            stops_early=decoder.device.type == "cpu",
        )
