"""What the parts of a round cost on this machine, in seconds: estimated, or measured with the network itself.

Shapes: B rows, n tokens of each row in one call, L layers, E exit, K drafts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from layerskip.decoding.adaptive.call_timer import CONTEXT, CallTimer, Measuring, finish
from layerskip.model.decoder import Decoder
from layerskip.model.drafts import CONFIDENCE_CLASSES, StopRule

MEASURED_QUERIES = (1, 2, 3, 5, 9)
"""Tokens of each row in one call that are timed; others lie on lines through these."""
MEASURED_TOKENS = (1, 2, 3, 5, 9, 17, 33)
"""The same of a network without padding, where the tokens of all rows together count."""
MEASURED_ROWS = 4
"""Rows by which the cost of further rows in drafting is timed there."""
FIRST_QUERIES = 3
"""Of these, the number that are timed first, with drafting: enough for costs that are better than estimates."""
MOST_QUERIES = 13
"""Tokens in one call whose costs are known."""
NEXT_EXIT = 4
"""Layers between the two exits at which drafting is timed, at most."""
DRAFT_ROW_COST = 0.7
"""Estimated cost of each further row in a pass of drafting without padding, as a share of the first one's."""
ROW_COST_CPU, ROW_COST_ROUNDED, ROW_COST_GPU = 0.25, 0.1, 0.01
"""Estimated cost of each further token in a call, as a share of the first one's: on a CPU in float32, there in int8 or
bfloat16, and on a GPU."""
BYTES_PER_SECOND = 1e10
"""Estimated; what counts is how plans compare, and rounds correct it."""
DISTURBED = 1.3
"""Ratio of a call's seconds to those of a larger one above which it must have been disturbed while it was timed."""
NEVER_STOP = StopRule(rates=(1.0,) * CONFIDENCE_CLASSES, least=0.0)
"""Asks after each draft, and goes on."""


def asks_apart(decoder: Decoder) -> bool:
    """Whether drafts that may stop early are made otherwise than a fixed number of them, and take longer."""
    return decoder.round_kind != "calls"


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of verification over n tokens of each row (index n - 1), and of drafting.

    Where nothing is padded, a round whose rows have different numbers of tokens costs what their mean says, and n need
    not be a whole number. Costs for one row say then what those for several are (`for_rows`).
    """

    num_layers: int
    layer: tuple[float, ...]
    """One layer."""
    fixed: tuple[float, ...]
    """All else that a call with a head needs: positions, embedding, norm and head, choosing tokens."""
    draft_layer: float
    """One layer for one token, while drafting."""
    draft_head: float
    """Norm, head and choice of a draft."""
    draft_fixed: float
    """All else of drafting, once a round."""
    adapters: Mapping[int, float] = field(default_factory=dict)
    """By exit that has an adapter: adapter, norm, head and choice of a draft."""
    asking: float = 0.0
    """What a draft takes longer where drafting may stop after it, if that is made otherwise than a fixed number of
    drafts is: in graphs, the host waits for each."""
    ragged: bool = False
    """Whether nothing is padded: rows may have different numbers of tokens, and each costs its own."""
    draft_row: float = 0.0
    """Where nothing is padded, the part of a pass of drafting that each of the rows adds, as a share of the whole."""
    attention: float = 0.0
    """A pass of all layers, for each token of all rows that attention reads."""
    shares_states: bool = True
    """Whether verification goes on from the states of drafting, which runs the last draft through its layers too."""
    complete: bool = True
    """Whether nothing is left to measure."""

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Costs":
        """What `dataclasses.asdict` made JSON of.

        Raises:
            TypeError: Something else.
        """
        found: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in fields.items()}
        found["adapters"] = {int(exit_layer): seconds for exit_layer, seconds in found["adapters"].items()}
        return cls(**found)

    @property
    def most_drafts(self) -> int:
        """Drafts that a round may have at most for its costs to be known."""
        return min(MOST_QUERIES, len(self.layer)) - 1

    @property
    def is_plausible(self) -> bool:
        """Whether no call takes much longer than a larger one, as it seems to if something disturbed its timing."""
        seconds = [self.verification(0, n) for n in range(len(self.layer))]
        return all(each <= DISTURBED * min(seconds[n:]) for n, each in enumerate(seconds))

    def step(self) -> float:
        """One autoregressive step."""
        return self.fixed[0] + self.num_layers * self.layer[0]

    def drafting(self, exit_layer: int, num_drafts: float, drawn: float | None = None) -> float:
        """Write tokens at an exit.

        Args:
            exit_layer: E.
            num_drafts: K, those of the row that has most.
            drawn: Those of a row on average; K if not given. It is less where rows have different numbers.
        """
        missing = 0.0 if drawn is None or not self.ragged else self.draft_row * (num_drafts - drawn)
        passes, heads = num_drafts + self.shares_states - missing, num_drafts - missing
        return (
            self.draft_fixed
            + passes * exit_layer * self.draft_layer
            + heads * self.adapters.get(exit_layer, self.draft_head)
        )

    def verification(self, exit_layer: int, num_drafts: float) -> float:
        """The layers from the exit on, and the head, over the drafts of each row and the token before them."""
        depth = self.num_layers - exit_layer
        below = min(int(num_drafts), len(self.layer) - 1)
        seconds = self.fixed[below] + depth * self.layer[below]
        share = num_drafts - below
        if share and below + 1 < len(self.layer):
            above = self.fixed[below + 1] + depth * self.layer[below + 1]
            seconds += min(1.0, share) * (above - seconds)
        return seconds

    def round(self, exit_layer: int, num_drafts: float, *, drawn: float | None = None, most: float = 0.0) -> float:
        """Draft at an exit and verify; at exit 0 drafts come for nothing.

        Args:
            exit_layer: E.
            num_drafts: Verified drafts of a row, on average where nothing is padded.
            drawn: Drafts of a row that were drawn, on average; those that are verified if not given.
            most: Passes of drafting: the drafts of the row that has most; those of all if not given.
        """
        drawn = num_drafts if drawn is None else drawn
        drafting = self.drafting(exit_layer, max(most, drawn), drawn) if exit_layer else 0.0
        return drafting + self.verification(exit_layer if self.shares_states else 0, num_drafts)

    def for_rows(self, num_rows: int) -> "Costs":
        """Costs of several rows, from those of one without padding."""
        if num_rows == 1:
            return self
        counts = range(num_rows, num_rows * MOST_QUERIES + 1, num_rows)
        factor = 1 + (num_rows - 1) * self.draft_row
        return replace(
            self,
            layer=tuple(_extended(self.layer, n) for n in counts),
            fixed=tuple(_extended(self.fixed, n) for n in counts),
            draft_layer=factor * self.draft_layer,
            draft_head=factor * self.draft_head,
            adapters={exit_layer: factor * seconds for exit_layer, seconds in self.adapters.items()},
            draft_row=num_rows * self.draft_row / factor,
        )


def _extended(values: Sequence[float], n: int) -> float:
    """The value at n, from the first one on; beyond the last one, on the line that the second half of them makes."""
    last = len(values)
    if n <= last:
        return values[n - 1]
    middle = max(1, last // 2)
    return values[-1] + (n - last) * max(0.0, values[-1] - values[middle - 1]) / max(1, last - middle)


def estimate_costs(decoder: Decoder) -> Costs:
    """Costs by the bytes of weights that calls read, without running anything: how plans compare, not seconds."""
    depth, row = decoder.num_layers, ROW_COST_GPU
    if decoder.device.type == "cpu":
        row = ROW_COST_CPU if decoder.compute == "float32" else ROW_COST_ROUNDED

    def seconds(num_bytes: int) -> float:
        """The same in all processes that share the network, whose shares differ a little."""
        return decoder.common(num_bytes) / BYTES_PER_SECOND

    layer = seconds(decoder.weight_bytes(0, depth, head=False)) / depth
    head = seconds(decoder.weight_bytes(0, 0))
    bare = next(exit_layer for exit_layer in range(1, depth + 2) if exit_layer not in decoder.adapted_exits)
    drafter = decoder.drafter(bare)
    calls = range(MEASURED_TOKENS[-1] if decoder.ragged else MOST_QUERIES)
    return Costs(
        num_layers=depth,
        layer=tuple(layer * (1 + row * n) for n in calls),
        fixed=tuple(head * (1 + row * n) for n in calls),
        draft_layer=seconds(drafter.decoder.weight_bytes(0, 1, head=False)),
        draft_head=seconds(drafter.decoder.weight_bytes(0, 0)),
        draft_fixed=0.0,
        adapters={
            exit_layer: seconds(decoder.drafter(exit_layer).decoder.adapter_bytes())
            for exit_layer in decoder.adapted_exits
        },
        asking=seconds(drafter.decoder.weight_bytes(0, 0)) if asks_apart(decoder) else 0.0,
        ragged=decoder.ragged,
        draft_row=DRAFT_ROW_COST if decoder.ragged else 0.0,
        attention=seconds(decoder.token_bytes) if decoder.ragged else 0.0,
        shares_states=drafter.shares_states,
        complete=False,
    )


def measure_costs(
    decoder: Decoder, num_rows: int, *, context: int = CONTEXT, queries: Sequence[int] | None = None
) -> Costs:
    """Time the network's calls: some twenty passes, or ten of a slow network; arguments as for `measuring`."""
    with decoder.own_threads():
        return finish(measuring(decoder, num_rows, context=context, queries=queries))


def measuring(
    decoder: Decoder, num_rows: int, *, context: int = CONTEXT, queries: Sequence[int] | None = None
) -> Measuring[Costs, Costs]:
    """Time the network's calls one by one; costs that are not complete come out as soon as they are better than none.

    Args:
        decoder: The network.
        num_rows: B.
        context: Tokens of each row before those that are timed.
        queries: Tokens in one call that are timed, ascending from 1; others lie on lines through these. If not given,
            `MEASURED_QUERIES`, or `MEASURED_TOKENS` of a single row without padding, whose costs serve for all numbers
            of rows.
    """
    alone = decoder.ragged and num_rows == 1
    queries = queries or (MEASURED_TOKENS if alone else MEASURED_QUERIES)
    counts = [n for n in queries if context + n <= decoder.max_context] or [1]
    timer = CallTimer(decoder, num_rows, counts[-1], context, summary=min)  # whatever disturbs a call makes it longer
    depth, most = decoder.num_layers, max(MOST_QUERIES, counts[-1])
    layer: list[float] = []
    fixed: list[float] = []
    drafts: _DraftCosts | None = None
    draft_row = DRAFT_ROW_COST
    weight_bytes = max(1, decoder.weight_bytes(0, depth))
    for n in counts:
        one = yield from timer.timing(depth - 1, depth, n)
        every = yield from timer.timing(0, depth, n)
        layer.append(max(0.0, every - one) / max(1, depth - 1))
        fixed.append(max(0.0, one - layer[-1]))
        if n not in (counts[min(FIRST_QUERIES, len(counts)) - 1], counts[-1]):
            continue
        drafts = drafts or (yield from _measuring_drafts(timer, decoder, counts[-1], layer[0], fixed[0]))
        if alone and n == counts[-1]:
            draft_row = yield from _measuring_draft_row(decoder, counts[-1], context)
        costs = Costs(
            num_layers=depth,
            layer=_completed(counts, layer, most),
            fixed=_completed(counts, fixed, most),
            draft_layer=drafts.layer,
            draft_head=drafts.head,
            draft_fixed=drafts.fixed,
            adapters=drafts.adapters,
            asking=drafts.asking,
            ragged=decoder.ragged,
            draft_row=draft_row if alone else 0.0,
            # Keys and values are read from memory as weights are.
            attention=(fixed[0] + depth * layer[0]) * decoder.token_bytes / weight_bytes if alone else 0.0,
            shares_states=decoder.drafter(1).shares_states,
            complete=n == counts[-1],
        )
        if not costs.complete:
            yield costs
    return costs


@dataclass(frozen=True, kw_only=True)
class _DraftCosts:
    """The parts of `Costs` that concern drafting."""

    layer: float
    head: float
    fixed: float
    adapters: Mapping[int, float] = field(default_factory=dict)
    asking: float = 0.0


def _measuring_drafts(
    timer: "CallTimer", decoder: Decoder, most_queries: int, layer: float, fixed: float
) -> Measuring[Costs, _DraftCosts]:
    """Time drafting, or take the seconds of a layer and of all else in a plain step where it can't be timed."""
    depth, most = decoder.num_layers, min(5, most_queries - 1)
    bare = [exit_layer for exit_layer in range(1, depth // 2 + 2) if exit_layer not in decoder.adapted_exits]
    first, deeper = bare[0], bare[min(NEXT_EXIT, len(bare) - 1)]
    if most <= 1 or deeper <= first:
        return _DraftCosts(layer=layer, head=fixed, fixed=fixed, asking=fixed if asks_apart(decoder) else 0.0)
    shares_states = decoder.drafter(first).shares_states
    single = yield from timer.draft_timing(first, 1)
    several = yield from timer.draft_timing(first, most)
    deep = yield from timer.draft_timing(deeper, most)
    draft_layer = max(0.0, deep - several) / ((most + shares_states) * (deeper - first))
    draft_head = max(0.0, (several - single) / (most - 1) - first * draft_layer)
    draft_fixed = max(0.0, single - (1 + shares_states) * first * draft_layer - draft_head)
    adapters: dict[int, float] = {}
    for exit_layer in decoder.adapted_exits:
        passes = (most + shares_states) * exit_layer * draft_layer
        seconds = yield from timer.draft_timing(exit_layer, most)
        adapters[exit_layer] = max(0.0, (seconds - draft_fixed - passes) / most)
    asking = 0.0
    if asks_apart(decoder):
        asked = yield from timer.draft_timing(first, most, NEVER_STOP)
        asking = max(0.0, (asked - several) / most)
    return _DraftCosts(layer=draft_layer, head=draft_head, fixed=draft_fixed, adapters=adapters, asking=asking)


def _measuring_draft_row(decoder: Decoder, most_queries: int, context: int) -> Measuring[Costs, float]:
    """Time drafting with one row and with several: what each further one adds, as a share of the first."""
    exit_layer = (*decoder.adapted_exits, 1)[0]
    if most_queries < 2 or exit_layer >= decoder.num_layers:
        return DRAFT_ROW_COST
    alone = yield from CallTimer(decoder, 1, 2, context, summary=min).draft_timing(exit_layer, 1)
    together = yield from CallTimer(decoder, MEASURED_ROWS, 2, context, summary=min).draft_timing(exit_layer, 1)
    return min(1.0, max(0.0, together / alone - 1) / (MEASURED_ROWS - 1))


def _completed(counts: Sequence[int], values: Sequence[float], most: int) -> tuple[float, ...]:
    """Values at 1, 2, ... `most`, on lines through those that were measured at the first of the counts."""
    if len(values) == 1:
        return (values[0],) if len(counts) == 1 else tuple(values[0] for _ in range(most))
    found = []
    for n in range(1, most + 1):
        above = next((i for i, count in enumerate(counts[: len(values)]) if count >= n), len(values) - 1)
        below = max(0, above - 1)
        share = (n - counts[below]) / max(1, counts[above] - counts[below])
        found.append(max(values[below] + share * (values[above] - values[below]), 0.0))
    return tuple(found)
