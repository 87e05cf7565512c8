"""What a server counts, in Prometheus's text format; names and meanings mirror vLLM's, with the prefix `layerskip:`.

The thread that owns the engine reports every round, so nothing but whole numbers is added there, under a lock that is
held for well below a microsecond. Names, labels and text are made when somebody asks for them.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any

from layerskip.errors import InvalidArgumentError

PREFIX = "layerskip:"
MOST_POSITIONS = 32
"""Positions of drafts that have series; drafts beyond them are part of the totals only."""
MOST_REASONS = 16
"""Different reasons for which requests finish; further ones are counted as `other`."""
KNOWN_REASONS = ("stop", "length", "tool_calls", "abort", "error")
"""Reasons that have a series from the start, so that their rates begin at 0."""
DRAFTERS = ("early_exit", "exit_adapter", "ngram")
"""Drafters that have a series from the start."""

FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.4, 0.6, 0.8),
    *(1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0),
)
INTER_TOKEN_BUCKETS = (
    *(0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
REQUEST_BUCKETS = (
    *(0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0),
    *(50.0, 60.0, 120.0, 240.0, 480.0, 960.0),
)
QUEUE_BUCKETS = (0.0005, 0.001, *REQUEST_BUCKETS)
LENGTH_BUCKETS = tuple(float(2**power) for power in range(18))
"""Of tokens: 1 to 131072."""

HELP = {
    "num_requests_running": "Requests that have a place in the batch: their prompt is read or tokens are generated.",
    "num_requests_waiting": "Requests that were accepted and wait for a place in the batch.",
    "kv_cache_usage_perc": "Part of the cache's room for keys and values that is in use, as a fraction: 1 is all.",
    "prefix_cache_queries": "Tokens of prompts that were looked up in the prefix cache.",
    "prefix_cache_hits": "Tokens of prompts whose keys and values were found there, so that they weren't read again.",
    "prompt_tokens": "Tokens of the prompts of finished requests, found in the prefix cache or not.",
    "generation_tokens": "Tokens generated; a round can add several to a request.",
    "spec_decode_num_drafts": "Rounds of a request in which tokens were drafted and verified.",
    "spec_decode_num_draft_tokens": "Tokens drafted in these rounds.",
    "spec_decode_num_accepted_tokens": "Drafted tokens that were accepted.",
    "spec_decode_num_draft_tokens_per_pos": "Tokens drafted, by their position among a round's drafts, from 0.",
    "spec_decode_num_accepted_tokens_per_pos": "Drafted tokens accepted, by their position among a round's drafts.",
    "time_to_first_token_seconds": "Seconds from a request's arrival to its first token.",
    "inter_token_latency_seconds": "Seconds between a request's tokens; the time of a round is shared out evenly over "
    "the tokens that it adds.",
    "e2e_request_latency_seconds": "Seconds from a request's arrival to its end, however it ended.",
    "request_queue_time_seconds": "Seconds that a request waited for a place in the batch.",
    "request_prompt_tokens": "Tokens of the prompt of each finished request.",
    "request_generation_tokens": "Tokens generated for each finished request.",
    "request_success": "Requests that finished, by reason.",
}


class Tally:
    """A histogram to which the same value can be added many times at once."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """Args: `bounds` are upper bounds, ascending; a last bucket without a bound follows them."""
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count a value; NaN isn't counted."""
        if value == value:
            self._counts[bisect_left(self._bounds, value)] += times
            self._sum += value * times

    def snapshot(self) -> tuple[list[int], float]:
        """How often each bucket was met, and the sum of all values."""
        return self._counts.copy(), self._sum

    def cumulative(self, counts: Sequence[int]) -> list[tuple[str, float]]:
        """Buckets as Prometheus has them: (upper bound, number of values up to it)."""
        bounds = [*(repr(bound) for bound in self._bounds), "+Inf"]
        total, buckets = 0, []
        for bound, count in zip(bounds, counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        return buckets


@dataclass(slots=True)
class Rounds:
    """Rounds of one drafter."""

    drafted: list[int] = field(default_factory=lambda: [0] * (MOST_POSITIONS + 1))
    """How often exactly 0, 1, 2, ... tokens were drafted; the last entry is of all larger numbers, too."""
    accepted: list[int] = field(default_factory=lambda: [0] * (MOST_POSITIONS + 1))
    """The same for accepted ones."""
    draft_tokens: int = 0
    accepted_tokens: int = 0

    def copy(self) -> "Rounds":
        """The numbers as they are now."""
        return replace(self, drafted=self.drafted.copy(), accepted=self.accepted.copy())


class ServerMetrics:
    """What one server counts, in a registry of its own; several servers in a process don't see each other's.

    All methods may be called by any thread.
    """

    def __init__(self, model: str) -> None:
        """Start counting.

        Args:
            model: The served name of the model, the label `model_name` of every series.

        Raises:
            InvalidArgumentError: `prometheus_client` isn't installed.
        """
        try:
            from prometheus_client import CollectorRegistry, ProcessCollector
        except ImportError as error:
            raise InvalidArgumentError(
                "prometheus_client, which writes /metrics, is not installed here: pip install 'layerskip[serve]'"
            ) from error
        self.model = model
        self._lock = Lock()
        self._running = self._waiting = 0
        self._cache_usage = 0.0
        self._prefix_queries = self._prefix_hits = 0
        self._prompt_tokens = self._generation_tokens = 0
        self._rounds = {name: Rounds() for name in DRAFTERS}
        self._reasons = dict.fromkeys(KNOWN_REASONS, 0)
        self._first_token = Tally(FIRST_TOKEN_BUCKETS)
        self._inter_token = Tally(INTER_TOKEN_BUCKETS)
        self._request = Tally(REQUEST_BUCKETS)
        self._queue = Tally(QUEUE_BUCKETS)
        self._prompt_length, self._generation_length = Tally(LENGTH_BUCKETS), Tally(LENGTH_BUCKETS)
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def set_load(self, running: int, waiting: int, cache_usage: float) -> None:
        """Say how busy the server is now.

        Args:
            running: Requests in the batch.
            waiting: Requests accepted, not yet in the batch.
            cache_usage: Part of the cache's room in use, 0..1.
        """
        with self._lock:
            self._running, self._waiting, self._cache_usage = running, waiting, cache_usage

    def observe_prefix(self, queries: int, hits: int) -> None:
        """A prompt was looked up in the prefix cache.

        Args:
            queries: Tokens looked up.
            hits: Tokens found, at most `queries`.
        """
        with self._lock:
            self._prefix_queries += queries
            self._prefix_hits += hits

    def observe_round(self, drafter: str | None, num_drafts: int, num_accepted: int) -> None:
        """One row went through one round.

        Args:
            drafter: Who drafted; None for a step without drafts, which isn't counted.
            num_drafts: Tokens drafted and verified; 0 isn't counted either.
            num_accepted: Tokens accepted, at most `num_drafts`.
        """
        if drafter is None or num_drafts < 1:
            return
        with self._lock:
            rounds = self._rounds.get(drafter) or self._rounds.setdefault(drafter, Rounds())
            rounds.drafted[num_drafts if num_drafts < MOST_POSITIONS else MOST_POSITIONS] += 1
            rounds.accepted[num_accepted if num_accepted < MOST_POSITIONS else MOST_POSITIONS] += 1
            rounds.draft_tokens += num_drafts
            rounds.accepted_tokens += num_accepted

    def observe_tokens(self, number: int, seconds_since_last: float | None) -> None:
        """A row gained tokens.

        Args:
            number: How many, at least 1.
            seconds_since_last: Seconds since the row's last tokens; None if these are its first. Each of the tokens is
                taken to have come after an equal part of it.
        """
        with self._lock:
            self._generation_tokens += number
            if seconds_since_last is not None and number > 0:
                self._inter_token.add(seconds_since_last / number, number)

    def observe_first_token(self, seconds: float) -> None:
        """A request got its first token, so many seconds after it arrived."""
        with self._lock:
            self._first_token.add(seconds)

    def observe_finished(
        self, reason: str, prompt_tokens: int, generation_tokens: int, seconds: float, queue_seconds: float
    ) -> None:
        """A request has ended.

        Args:
            reason: Why, the label `finished_reason`: one of few, such as `stop`, `length`, `abort`, `error`.
            prompt_tokens: Tokens of its prompt.
            generation_tokens: Tokens that it got, all of which `observe_tokens` has counted already.
            seconds: From its arrival to its end.
            queue_seconds: From its arrival to its place in the batch; all of `seconds` if it never got one.
        """
        with self._lock:
            if reason not in self._reasons and len(self._reasons) >= MOST_REASONS:
                reason = "other"
            self._reasons[reason] = self._reasons.get(reason, 0) + 1
            self._prompt_tokens += prompt_tokens
            self._queue.add(queue_seconds)
            self._request.add(seconds)
            self._prompt_length.add(prompt_tokens)
            self._generation_length.add(generation_tokens)

    def render(self) -> tuple[bytes, str]:
        """All series in Prometheus's text format, and the content type of that."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry), "text/plain; version=0.0.4; charset=utf-8"

    def collect(self) -> Iterator[Any]:
        """All families of series, with the numbers of one moment; `prometheus_client` asks for them."""
        with self._lock:
            gauges = {
                "num_requests_running": self._running,
                "num_requests_waiting": self._waiting,
                "kv_cache_usage_perc": self._cache_usage,
            }
            counters = {
                "prefix_cache_queries": self._prefix_queries,
                "prefix_cache_hits": self._prefix_hits,
                "prompt_tokens": self._prompt_tokens,
                "generation_tokens": self._generation_tokens,
            }
            tallies = {
                "time_to_first_token_seconds": self._first_token,
                "inter_token_latency_seconds": self._inter_token,
                "e2e_request_latency_seconds": self._request,
                "request_queue_time_seconds": self._queue,
                "request_prompt_tokens": self._prompt_length,
                "request_generation_tokens": self._generation_length,
            }
            histograms = {name: (tally, *tally.snapshot()) for name, tally in tallies.items()}
            reasons = dict(self._reasons)
            rounds = {drafter: of.copy() for drafter, of in self._rounds.items()}
        yield from self._plain_families(gauges, counters, histograms)
        finished = {(reason,): count for reason, count in reasons.items()}
        yield self._family("request_success", finished, "finished_reason")
        yield from self._speculation_families(rounds)

    def _plain_families(
        self, gauges: dict[str, float], counters: dict[str, int], histograms: dict[str, tuple[Tally, list[int], float]]
    ) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily

        for name, value in gauges.items():
            gauge = GaugeMetricFamily(PREFIX + name, HELP[name], labels=["model_name"])
            gauge.add_metric([self.model], value)
            yield gauge
        for name, count in counters.items():
            yield self._family(name, {(): count})
        for name, (tally, counts, total) in histograms.items():
            histogram = HistogramMetricFamily(PREFIX + name, HELP[name], labels=["model_name"])
            histogram.add_metric([self.model], tally.cumulative(counts), total)
            yield histogram

    def _speculation_families(self, rounds: dict[str, Rounds]) -> Iterator[Any]:
        for name, series in (
            ("spec_decode_num_drafts", {(drafter,): sum(of.drafted) for drafter, of in rounds.items()}),
            ("spec_decode_num_draft_tokens", {(drafter,): of.draft_tokens for drafter, of in rounds.items()}),
            ("spec_decode_num_accepted_tokens", {(drafter,): of.accepted_tokens for drafter, of in rounds.items()}),
        ):
            yield self._family(name, series, "drafter")
        for name, counts in (
            ("spec_decode_num_draft_tokens_per_pos", {drafter: of.drafted for drafter, of in rounds.items()}),
            ("spec_decode_num_accepted_tokens_per_pos", {drafter: of.accepted for drafter, of in rounds.items()}),
        ):
            reached = {drafter: _reached(of) for drafter, of in counts.items()}
            # Positions that no round has reached have no series yet.
            by_position = {
                (drafter, str(position)): count
                for drafter, of in reached.items()
                for position, count in enumerate(of)
                if count or position == 0
            }
            yield self._family(name, by_position, "drafter", "position")

    def _family(self, name: str, series: dict[Any, int], *labels: str) -> Any:
        """A counter, by the values of its labels."""
        from prometheus_client.core import CounterMetricFamily

        family = CounterMetricFamily(PREFIX + name, HELP[name], labels=["model_name", *labels])
        for values, count in series.items():
            family.add_metric([self.model, *values], count)
        return family


def _reached(counts: Sequence[int]) -> list[int]:
    """From how often there were exactly 0, 1, 2, ... tokens to how often there was one at position 0, 1, ..."""
    total, reached = 0, []
    for count in reversed(counts[1:]):
        total += count
        reached.append(total)
    return reached[::-1]
