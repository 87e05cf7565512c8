"""The engine: requests join, every step gives tokens, rows leave. It knows tokens only; text is `output`'s."""

import time
from dataclasses import dataclass

from layerskip.decoding.adaptive.experience import Experience
from layerskip.decoding.batch import Batch, batch_key, needs_of
from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.policy import DrafterName, FixedPolicy, Plan, Policy, RoundResult
from layerskip.decoding.request import Request, choose_exit_layer, depth_of
from layerskip.decoding.rounds.plain import PREFILL_CHUNK, read_chunk, step
from layerskip.decoding.rounds.verifying import run_round
from layerskip.decoding.row import FinishReason, Row
from layerskip.decoding.slots import Slots
from layerskip.errors import InvalidArgumentError
from layerskip.model.decoder import Decoder
from layerskip.model.finite import NO_TOKEN, not_finite


@dataclass(kw_only=True)
class Event:
    """Tokens that a row has gained: first accepted drafts, then the target's own token."""

    row: Row
    tokens: tuple[int, ...]
    num_accepted: int = 0
    drafts: tuple[int, ...] = ()
    """The drafts that were verified."""
    drafter: DrafterName | None = None
    """What drafted them."""


def make_policy(config: GenerationConfig, decoder: Decoder, experience: Experience) -> Policy | None:
    """The policy that a config asks for; None where every row takes one step after the other."""
    match config.strategy:
        case "autoregressive" | "early_exit":
            return None
        case "adaptive":
            return experience.policy(exit_layer=config.exit_layer, most_drafts=config.num_speculations)
        case "ngram":
            return FixedPolicy(fixed=Plan(source="text", num_speculations=config.draft_length))
        case _:
            exit_layer = choose_exit_layer(config, decoder)
            plan = Plan(source="layers", exit_layer=exit_layer, num_speculations=config.draft_length)
            return FixedPolicy(fixed=plan)


class Engine:
    """Generates for requests that join and leave between steps.

    Rows that can share rounds form a batch; a step runs one round of each batch, and reads one chunk of the prompts
    that have joined. What is generated for a request depends on the request alone, with two exceptions: kernels that
    round a product of several rows otherwise than that of one (torch's), and rejection sampling with adaptive
    decoding, whose plans depend on measured times.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        max_rows: int,
        capacity: int,
        experience: Experience | None = None,
        keeps_prefixes: bool = False,
        prefill_chunk: int = PREFILL_CHUNK,
        policy: Policy | None = None,
    ) -> None:
        """Allocate the cache.

        Args:
            decoder: The network.
            max_rows: Rows that may run at once.
            capacity: Tokens that a row can hold: its prompt and what is generated.
            experience: What adaptive decoding knows of the network, and adds to.
            keeps_prefixes: Keep the keys and values of rows that have ended, for requests that begin alike.
            prefill_chunk: Tokens of each prompt that a step reads at most.
            policy: Plans the rounds of all rows with drafts; that of each config if not given.

        Raises:
            InvalidArgumentError: No rows or no capacity.
            OutOfMemoryError: The cache doesn't fit.
        """
        self.decoder = decoder
        self._experience = experience or Experience(decoder)
        self._slots = Slots(decoder, max_rows, capacity, keeps_prefixes=keeps_prefixes)
        self._prefill_chunk, self._policy = prefill_chunk, policy
        self._reading: list[Batch] = []
        self._running: list[Batch] = []
        self._new: list[tuple[Row, Batch]] = []
        """Rows that have joined since the last step, and the batches that they will run in."""
        self._homes: dict[Row, Batch] = {}
        """The batch that each row runs in, or will run in once its prompt is read."""

    @property
    def rows(self) -> list[Row]:
        """Rows that are read or generated at present."""
        return list(self._homes)

    @property
    def free_rows(self) -> int:
        """Requests that can join now."""
        return self._slots.cache.num_rows - len(self._homes)

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold."""
        return self._slots.cache.capacity

    def policy_of(self, row: Row) -> Policy | None:
        """What plans the rounds of a row that hasn't ended."""
        return self._homes[row].policy

    def reserve(self, max_rows: int, capacity: int) -> None:
        """Make room for so many rows of so many tokens, at least.

        Raises:
            OutOfMemoryError: The cache doesn't fit; the engine is as it was.
        """
        self._slots.grow(max_rows, capacity)

    def add(self, request: Request) -> Row:
        """Let a request join; its prompt is read by the steps that follow.

        Raises:
            InvalidArgumentError: No row is free, or the request is longer than a row.
        """
        if not self.free_rows:
            raise InvalidArgumentError(f"all {len(self._homes)} rows of the engine are in use; finish one first")
        needed = len(request.tokens) + request.max_new_tokens
        if needed > self.capacity:
            raise InvalidArgumentError(
                f"a request of {len(request.tokens)} + {request.max_new_tokens} tokens doesn't fit a row of "
                f"{self.capacity}; shorten it, or reserve more capacity"
            )
        row = Row(request=request, tokens=list(request.tokens))
        home = self._home(request.config)
        reading = next((batch for batch in self._reading if batch.depth == home.depth), None)
        if reading is None:
            reading = Batch(self.decoder, "reading", "tokens", home.depth, None)
            self._reading.append(reading)
        self._slots.batches = [*self._running, *self._reading]
        row.recorder.cached_tokens = self._slots.claim(row, reading)
        self._homes[row] = home
        self._new.append((row, home))
        return row

    def step(self) -> list[Event]:
        """One round of every batch, then one chunk of the prompts that are being read.

        Returns:
            What the rows have gained. Rows that have ended have left the engine.

        Raises:
            NotFiniteError: A token could not be chosen.
        """
        with self.decoder.own_threads():
            if self._new:
                self._settle()
                self._start_new()
            events: list[Event] = []
            for batch in list(self._running):
                events += self._run(batch)
            for batch in list(self._reading):
                events += self._read(batch)
        return events

    def finish(
        self, row: Row, reason: FinishReason, stop_reason: int | str | None = None, *, length: int | None = None
    ) -> None:
        """End a row, between steps; also one that has ended, whose text turns out to have ended earlier.

        Args:
            row: Any row of this engine.
            reason: Why.
            stop_reason: The token or text that ended it, where the reason is `stop`.
            length: Tokens of its output to keep; all if not given.
        """
        row.finish_reason, row.stop_reason = reason, stop_reason
        if length is not None:
            row.cut(length)
        if row in self._homes:
            self._drop([row])
            self._settle()

    def _home(self, config: GenerationConfig) -> Batch:
        """The batch for rows with this config."""
        key = batch_key(config, self.decoder)
        for batch in [*self._running, *self._homes.values()]:
            if batch.key == key:
                return batch
        policy = make_policy(config, self.decoder, self._experience)
        if policy is not None and self._policy is not None:
            policy = self._policy
        return Batch(self.decoder, key, needs_of(config), depth_of(config, self.decoder), policy)

    def _start_new(self) -> None:
        """Measure what the policies of new batches need; then the time of the new rows begins."""
        homes = {id(home): home for _, home in self._new if not home.prepared}
        for home in homes.values():
            arrivals = Batch(self.decoder, home.key, home.needs, home.depth, None)
            arrivals.rows = [row for row, other in self._new if other is home]
            if home.policy is not None:
                home.policy.prepare(arrivals)
            home.prepared = True
        for row, _ in self._new:
            row.recorder.start()
        self._new.clear()

    def _read(self, batch: Batch) -> list[Event]:
        """Read a chunk of prompts; rows that are done with theirs get their first token and join their batches."""
        calls = self.decoder.calls.count
        first = read_chunk(batch, self._prefill_chunk)
        rows = [batch.rows[place] for place in first]
        calls = self.decoder.calls.count - calls
        for row in batch.rows:
            row.recorder.layer_calls += calls
        events = []
        for row, token in zip(rows, first.values(), strict=True):
            self._check([token])
            kept = row.append((token,))
            row.recorder.record_tokens()
            events.append(Event(row=row, tokens=kept))
        for row in rows:
            home = self._homes[row]
            if not any(home is other for other in self._running):
                self._running.append(home)
            self._slots.batches = [*self._running, *self._reading]
            self._slots.move(row, batch, home)
        self._drop([row for row in rows if row.finish_reason is not None])
        self._settle()
        return events

    def _run(self, batch: Batch) -> list[Event]:
        """One round of a batch, as its policy plans it."""
        decoder, policy, started = self.decoder, batch.policy, time.perf_counter()
        calls, provisional = decoder.calls.count, decoder.provisional_rounds
        drafter: DrafterName | None = None
        if policy is None:
            result = step(batch)
        else:
            plan = batch.resting or policy.plan(batch)
            if plan.steps:
                result = self._rest(batch, plan)
            else:
                result = run_round(batch, plan)
                if not isinstance(policy, FixedPolicy):  # nobody else asks, and processes would have to agree on it
                    result.seconds = decoder.stopwatch.since(started)
                result.settled = decoder.provisional_rounds == provisional
                policy.observe(plan, result)
            drafter = plan.drafter(decoder.config.adapted_exits)
            if plan.source != "none" or plan.probe:
                for row in batch.rows:
                    row.recorder.seconds_drafting += result.seconds_drafting
                    row.recorder.seconds_verifying += result.seconds_verifying
        return self._extend(batch, result, decoder.calls.count - calls, drafter)

    def _rest(self, batch: Batch, plan: Plan) -> RoundResult:
        """The next of several steps without drafts that were planned at once."""
        started, provisional = time.perf_counter(), self.decoder.provisional_rounds
        result = step(batch)
        batch.resting, batch.num_steps = plan, batch.num_steps + 1
        if self.decoder.provisional_rounds == provisional:
            batch.step_seconds.append(self.decoder.stopwatch.since(started))
        if batch.num_steps == plan.steps:
            batch.end_rest()
        return result

    def _extend(self, batch: Batch, result: RoundResult, calls: int, drafter: DrafterName | None = None) -> list[Event]:
        """Extend the rows by a round's tokens, and let those go that have ended."""
        events = []
        for place, row in enumerate(batch.rows):
            tokens, drafts = result.gained(place), result.drafts[place]
            self._check(tokens)
            kept = row.append(tokens)
            num_accepted = min(result.num_accepted[place], len(kept))
            row.recorder.layer_calls += calls
            row.recorder.record_tokens()
            row.recorder.record_round(len(drafts), num_accepted, drafter)
            by = drafter if drafts else None
            by_layers = drafter is not None and drafter != "ngram"
            row.remember(*((num_accepted, len(drafts)) if by_layers else (0, 0)))
            events.append(Event(row=row, tokens=kept, num_accepted=num_accepted, drafts=drafts, drafter=by))
            length = batch.cache.lengths[place]
            if length >= len(row.tokens):  # the row was cut short: what lies beyond its end is forgotten
                batch.cache.rollback(place, len(row.tokens) - 1)
        ended = [row for row in reversed(batch.rows) if row.finish_reason is not None]
        if ended:
            self._drop(ended)
            self._settle()
        return events

    def _check(self, tokens: tuple[int, ...] | list[int]) -> None:
        if NO_TOKEN in tokens:
            raise not_finite(self.decoder.dtype)

    def _drop(self, rows: list[Row]) -> None:
        """Take rows out of their batches."""
        for row in rows:
            del self._homes[row]
            self._new = [pair for pair in self._new if pair[0] is not row]
            batch = next(batch for batch in [*self._running, *self._reading] if row in batch.rows)
            self._slots.forget_from(row, len(row.tokens) - 1)
            self._slots.remove(row, batch)

    def _settle(self) -> None:
        """Bring batches and cache in line after rows have come, moved or gone."""
        for batch in self._running:
            if not batch.rows:
                batch.end_rest()
        self._running = [batch for batch in self._running if batch.rows]
        self._reading = [batch for batch in self._reading if batch.rows]
        self._slots.batches = [*self._running, *self._reading]
        self._slots.settle()
