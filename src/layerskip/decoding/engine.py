"""The engine: requests join, every step gives tokens, rows leave. It knows tokens only; text is `output`'s."""

import time
from collections.abc import Mapping, Sequence

from layerskip.decoding.adaptive.experience import Experience
from layerskip.decoding.batch import Batch, batch_key, needs_of
from layerskip.decoding.event import Event
from layerskip.decoding.ngrams.store import SuffixStore
from layerskip.decoding.policy import STEPS, DrafterName, FixedPolicy, Plan, Policy, RoundResult
from layerskip.decoding.prefix.blocks import PrefixBlocks, PrefixCounts
from layerskip.decoding.prefix.slots import Slots
from layerskip.decoding.request import Request, depth_of
from layerskip.decoding.rounds.pacing import ReadingPace, choose_prompts
from layerskip.decoding.rounds.plain import PREFILL_CHUNK, read_chunk
from layerskip.decoding.rounds.verifying import run_rounds
from layerskip.decoding.row import FinishReason, Row
from layerskip.decoding.rules.guide import Guide
from layerskip.decoding.rules.logprobs import TokenLogprobs
from layerskip.decoding.strategy import make_policy
from layerskip.errors import InvalidArgumentError
from layerskip.model.decoder import Decoder
from layerskip.model.finite import NO_TOKEN, not_finite

LEASE_SECONDS = 0.03
"""Seconds that a step's rounds may take where many of them can run in one call: nobody sees that tokens come later."""


class Engine:
    """Generates for requests that join and leave between steps.

    Rows that can share rounds form a batch; a step runs a round of each batch, and reads one chunk of the prompts that
    have joined. Where nothing else is to be done and nobody has to be asked in between, it runs several rounds. What is
    generated for a request depends on the request alone, with two exceptions: kernels that round a product of several
    rows otherwise than that of one (torch's), and rejection sampling with adaptive decoding, whose plans depend on
    measured times.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        max_rows: int,
        capacity: int,
        experience: Experience | None = None,
        keeps_prefixes: bool = False,
        prefix_blocks: PrefixBlocks | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        paces_reading: bool = False,
        shares_suffixes: bool = False,
        policy: Policy | None = None,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        """Allocate the cache.

        Args:
            decoder: The network.
            max_rows: Rows that may run at once.
            capacity: Tokens that a row can hold: its prompt and what is generated.
            experience: What adaptive decoding knows of the network, and adds to.
            keeps_prefixes: Keep the keys and values of rows that have ended where they are, for requests that begin
                alike.
            prefix_blocks: Keep those of all prompts and outputs in blocks of this memory instead.
            prefill_chunk: Tokens of each prompt that a step reads at most; with `paces_reading`, of all prompts.
            paces_reading: Read prompts one after the other, and no more of them at a time than takes about two rounds,
                while other rows generate. Chunks then depend on measured times.
            shares_suffixes: Draft from the outputs of requests that have ended, too, where the sequence itself is the
                drafter.
            policy: Plans the rounds of all rows with drafts; that of each config if not given.
            lease_seconds: After this time, a step begins no further round; with 0 it has one round of each batch.

        Raises:
            InvalidArgumentError: No rows or no capacity; prefixes kept in both ways, or blocks of too little memory.
            OutOfMemoryError: Cache or blocks don't fit.
        """
        self.decoder = decoder
        self._experience = experience or Experience(decoder)
        self._slots = Slots(decoder, max_rows, capacity, keeps_prefixes=keeps_prefixes, prefix_blocks=prefix_blocks)
        self._prefill_chunk, self._policy, self._lease_seconds = prefill_chunk, policy, lease_seconds
        self._pace = ReadingPace(prefill_chunk) if paces_reading else None
        self._suffixes = SuffixStore() if shares_suffixes else None
        self._reading: list[Batch] = []
        self._running: list[Batch] = []
        self._new: list[tuple[Row, Batch]] = []
        """Rows that have joined since the last step, and the batches that they will run in."""
        self._homes: dict[Row, Batch] = {}
        """The batch that each row runs in, or will run in once its prompt is read; in the order of their arrival."""

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

    @property
    def cache_usage(self) -> float:
        """Share of the cache that running rows have in use, 0..1."""
        cache = self._slots.cache
        return sum(len(row.tokens) for row in self._homes) / (cache.num_rows * cache.capacity)

    @property
    def prefix_counts(self) -> PrefixCounts:
        """What `prefix_blocks` have been good for so far; nothing without them."""
        return PrefixCounts() if self._slots.blocks is None else self._slots.blocks.counts

    def policy_of(self, row: Row) -> Policy | None:
        """What plans the rounds of a row that hasn't ended."""
        return self._homes[row].policy

    def take_memory(self) -> None:
        """Make the system give all memory of cache and blocks now, not when it is first written to."""
        with self.decoder.own_threads():
            self._slots.take_memory()

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
        row = Row(request=request, tokens=list(request.tokens), guide=self._guide(request), suffixes=self._suffixes)
        home = self._home(request)
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
        """Rounds of every batch, then one chunk of the prompts that are being read.

        With `paces_reading` it is a chunk of some of them: of the one that arrived first, and of those after it that
        are short.

        Returns:
            What the rows have gained. Rows that have ended have left the engine.

        Raises:
            NotFiniteError: A token could not be chosen.
        """
        with self.decoder.own_threads():
            if self._new:
                self._settle()
                self._start_new()
            if self._pace is not None:
                return self._paced_step(self._pace)
            events: list[Event] = []
            for batch in list(self._running):
                events += self._run(batch)
            for batch in list(self._reading):
                for row in batch.rows:
                    self._slots.fetch(row)
                events += self._read(batch, dict.fromkeys(range(batch.num_rows), self._prefill_chunk))
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
            with self.decoder.own_threads():  # what the row leaves behind may be copied
                self._drop([row])
                self._settle()

    def _guide(self, request: Request) -> Guide | None:
        if request.constraint is None:
            return None
        return Guide(request.constraint, request.eos_token_ids, self.decoder.config.vocab_size)

    def _home(self, request: Request) -> Batch:
        """The batch for the rows of such requests."""
        config, constrained = request.config, request.constraint is not None
        key = batch_key(config, self.decoder, constrained=constrained)
        for batch in [*self._running, *self._homes.values()]:
            if batch.key == key:
                return batch
        policy = make_policy(config, self.decoder, self._experience)
        if policy is not None and self._policy is not None:
            policy = self._policy
        needs = needs_of(config, constrained=constrained)
        return Batch(self.decoder, key, needs, depth_of(config, self.decoder), policy)

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

    def _paced_step(self, pace: ReadingPace) -> list[Event]:
        """A step that reads for no longer than its rounds allow; reads as much as ever where nobody waits for it."""
        events: list[Event] = []
        watch, started, budget = self.decoder.stopwatch, time.perf_counter(), self._prefill_chunk
        if self._running:
            recorder = self._running[0].rows[0].recorder
            rounds = recorder.rounds
            for batch in list(self._running):
                events += self._run(batch)
            pace.observe_round(watch.since(started) / (recorder.rounds - rounds))
            budget = pace.tokens()
        if self._reading:
            batch, counts = self._next_prompts(budget)
            started = time.perf_counter()
            events += self._read(batch, counts)
            watch.wait()
            size = sum(counts.values()) if self.decoder.ragged else len(counts) * max(counts.values())
            pace.observe_reading(size, watch.since(started))
        return events

    def _next_prompts(self, budget: int) -> tuple[Batch, dict[int, int]]:
        """The prompts that are read next: their batch, and by row of it, tokens to read."""
        batches = {row: batch for batch in self._reading for row in batch.rows}
        waiting = [row for row in self._homes if row in batches]
        batch = batches[waiting[0]]
        unread: dict[Row, int] = {}
        for row in waiting:
            if batches[row] is batch and sum(unread.values()) < budget:  # the next step may find more of the others
                left = len(row.tokens) - self._slots.fetch(row)
                if self._slots.finds_more(row, list(unread)):
                    break
                unread[row] = left
        places = [batch.rows.index(row) for row in unread]
        return batch, choose_prompts(list(unread.values()), places, budget, ragged=self.decoder.ragged)

    def _read(self, batch: Batch, counts: Mapping[int, int]) -> list[Event]:
        """Read a chunk of prompts; rows that are done with theirs get their first token and join their batches."""
        calls = self.decoder.calls.count
        first = read_chunk(batch, counts)
        rows = [batch.rows[place] for place in first]
        calls = self.decoder.calls.count - calls
        for place in counts:
            batch.rows[place].recorder.layer_calls += calls
        events = []
        for row, given in zip(rows, first.values(), strict=True):
            kept = self._gain(row, (given.token,), given.logprobs)
            row.recorder.record_tokens()
            events.append(Event(row=row, tokens=kept, logprobs=given.logprobs[: len(kept)]))
        for row in rows:
            home = self._homes[row]
            if not any(home is other for other in self._running):
                self._running.append(home)
            self._slots.keep_prompt(row, batch)
            self._slots.batches = [*self._running, *self._reading]
            self._slots.move(row, batch, home)
        self._drop([row for row in rows if row.finish_reason is not None])
        self._settle()
        return events

    def _run(self, batch: Batch) -> list[Event]:
        """Rounds of a batch, as its policy plans them."""
        started, calls = time.perf_counter(), self.decoder.calls.count
        plan = batch.resting or (STEPS if batch.policy is None else batch.policy.plan(batch))
        alone = len(self._running) == 1 and not self._reading and not batch.stops
        seconds = self._lease_seconds if alone else 0.0
        results = self._rest(batch, plan, seconds) if plan.steps else self._rounds(batch, plan, seconds, started)
        return self._extend(batch, plan, results, self.decoder.calls.count - calls)

    def _rounds(self, batch: Batch, plan: Plan, seconds: float, started: float) -> list[RoundResult]:
        """Rounds that the policy learns from; `started`: when it was asked for their plan."""
        decoder, policy, provisional = self.decoder, batch.policy, self.decoder.provisional_rounds
        results = run_rounds(batch, plan, most=plan.lease, seconds=seconds)
        if policy is None or isinstance(policy, FixedPolicy):  # processes would have to agree on times for nobody
            return results
        total, settled = decoder.stopwatch.since(started), decoder.provisional_rounds == provisional
        beside = total - sum(result.seconds_drafting + result.seconds_verifying for result in results)
        for result in results:
            forced = any(map(any, result.certain))
            own = result.seconds_drafting + result.seconds_verifying
            result.seconds = total if len(results) == 1 else own + beside / len(results)
            result.settled = settled and not forced
            if not forced or plan.source != "none" or plan.probe:  # else it isn't the plain step that was planned
                policy.observe(plan, result)
        return results

    def _rest(self, batch: Batch, plan: Plan, seconds: float) -> list[RoundResult]:
        """The next of several steps without drafts that were planned at once."""
        started, provisional = time.perf_counter(), self.decoder.provisional_rounds
        forced = batch.policy is not None and batch.forces
        steps = Plan(source="none") if forced else plan
        wanted = plan.steps - batch.num_steps
        results = run_rounds(batch, steps, most=wanted, seconds=seconds)
        batch.resting, batch.num_steps = plan, batch.num_steps + len(results)
        if batch.policy is None:
            return results
        batch.first_step = batch.first_step or results[0]
        if self.decoder.provisional_rounds == provisional and not forced:
            later = [result.seconds_verifying for result in results[1:]]  # the call itself counts with its first step
            batch.step_seconds += [self.decoder.stopwatch.since(started) - sum(later), *later]
        asked = plan.until_repeated and len(results) < wanted and self.decoder.stopwatch.since(started) < seconds
        if batch.num_steps == plan.steps or asked:
            batch.end_rest()
        return results

    def _extend(self, batch: Batch, plan: Plan, results: Sequence[RoundResult], calls: int) -> list[Event]:
        """Extend the rows by the tokens of rounds, and let those go that have ended."""
        for row in batch.rows:
            row.recorder.begin_step(calls)
        events: list[Event] = []
        if plan.source == "none" and len(results) > 1:
            events += [self._take_steps(row, place, results) for place, row in enumerate(batch.rows)]
        else:
            drafter = plan.drafter(self.decoder.config.adapted_exits)
            for result in results:
                events += [self._take(row, place, plan, drafter, result) for place, row in enumerate(batch.rows)]
            for event in events[: -batch.num_rows]:
                event.more = True
        for place, row in enumerate(batch.rows):
            row.recorder.record_tokens()
            length = batch.cache.lengths[place]
            if length >= len(row.tokens):  # the row was cut short: what lies beyond its end is forgotten
                batch.cache.rollback(place, len(row.tokens) - 1)
        ended = [row for row in reversed(batch.rows) if row.finish_reason is not None]
        if ended:
            self._drop(ended)
            self._settle()
        return events

    def _take_steps(self, row: Row, place: int, results: Sequence[RoundResult]) -> Event:
        """Extend a row by the tokens of several steps without drafts."""
        kept = self._gain(row, tuple(result.tokens[place] for result in results), ())
        row.recorder.rounds += len(results)
        row.grow_old(len(results))
        return Event(row=row, tokens=kept)

    def _take(self, row: Row, place: int, plan: Plan, drafter: DrafterName | None, result: RoundResult) -> Event:
        """Extend a row by the tokens of a round."""
        drafts, recorder = result.drafts[place], row.recorder
        certain = result.certain[place] if result.certain else ()
        logprobs = result.logprobs[place] if result.logprobs else ()
        kept = self._gain(row, result.gained(place), logprobs)
        event = Event(row=row, tokens=kept, drafts=drafts, logprobs=logprobs[: len(kept)])
        event.num_accepted = min(result.num_accepted[place], len(kept))
        recorder.record_round(len(drafts), event.num_accepted, drafter, certain, start=row.round_start)
        if plan.source != "none" or plan.probe:
            recorder.seconds_drafting += result.seconds_drafting
            recorder.seconds_verifying += result.seconds_verifying
        row.remember(*(result.tried(place) if plan.source == "layers" else (0, 0)))
        if drafts:
            event.drafter, event.exit_layer = drafter or "grammar", plan.exit_layer
        return event

    def _gain(self, row: Row, tokens: tuple[int, ...], logprobs: Sequence[TokenLogprobs]) -> tuple[int, ...]:
        """Extend a row; a constraint that leaves no token ends it, and nothing else does without one."""
        if NO_TOKEN not in tokens:
            kept = row.append(tokens)
        elif row.guide is None:
            raise not_finite(self.decoder.dtype)
        else:
            kept = row.append(tokens[: tokens.index(NO_TOKEN)])
            if row.finish_reason is None:
                row.fail("of the tokens that the grammar allows here, none has a finite score")
        row.logprobs += logprobs[: len(kept)]
        return kept

    def _drop(self, rows: list[Row]) -> None:
        """Take rows out of their batches."""
        for row in rows:
            del self._homes[row]
            self._new = [pair for pair in self._new if pair[0] is not row]
            batch = next(batch for batch in [*self._running, *self._reading] if row in batch.rows)
            if self._suffixes is not None:
                self._suffixes.add(row.legacy)
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
