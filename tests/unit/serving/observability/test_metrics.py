"""What the server counts is what Prometheus reads."""

import threading
import time
from typing import Any

import pytest

pytest.importorskip("prometheus_client")

from prometheus_client.parser import text_string_to_metric_families

from layerskip.serving.observability.metrics import (
    HELP,
    INTER_TOKEN_BUCKETS,
    MOST_POSITIONS,
    MOST_REASONS,
    PREFIX,
    ServerMetrics,
    Tally,
)


def scraped(metrics: ServerMetrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """All series by name and labels, `model_name` left out, as Prometheus's own parser reads them."""
    body, content_type = metrics.render()
    assert content_type.startswith("text/plain")
    series = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            if sample.name.startswith(PREFIX):
                labels = dict(sample.labels)
                assert labels.pop("model_name") == metrics.model
                series[sample.name.removeprefix(PREFIX), frozenset(labels.items())] = sample.value
    return series


def value(metrics: ServerMetrics, name: str, **labels: str) -> float:
    return scraped(metrics)[name, frozenset(labels.items())]


def test_rounds_by_drafter_and_position() -> None:
    metrics = ServerMetrics("m")
    for drafter, drafted, accepted in (
        ("early_exit", 4, 4),
        ("early_exit", 4, 1),
        ("early_exit", 2, 0),
        ("ngram", 3, 2),
    ):
        metrics.observe_round(drafter, drafted, accepted)
    metrics.observe_round(None, 0, 0)  # a plain step is no speculation
    metrics.observe_round("ngram", 0, 0)
    series = scraped(metrics)

    def of(name: str, **labels: str) -> float:
        return series[f"spec_decode_num_{name}_total", frozenset(labels.items())]

    assert [of("drafts", drafter=name) for name in ("early_exit", "ngram", "exit_adapter")] == [3, 1, 0]
    assert [of("draft_tokens", drafter=name) for name in ("early_exit", "ngram")] == [10, 3]
    assert [of("accepted_tokens", drafter=name) for name in ("early_exit", "ngram")] == [5, 2]
    drafted = [of("draft_tokens_per_pos", drafter="early_exit", position=str(i)) for i in range(4)]
    accepted = [of("accepted_tokens_per_pos", drafter="early_exit", position=str(i)) for i in range(4)]
    assert (drafted, accepted) == ([3, 3, 2, 2], [2, 1, 1, 1])
    assert sum(drafted) == 10
    assert sum(accepted) == 5


def test_positions_are_bounded() -> None:
    metrics = ServerMetrics("m")
    metrics.observe_round("ngram", 10_000, 5_000)
    metrics.observe_round("ngram", MOST_POSITIONS, MOST_POSITIONS)
    series = scraped(metrics)
    positions = {int(dict(labels)["position"]) for name, labels in series if "per_pos" in name}
    assert positions == set(range(MOST_POSITIONS))
    assert value(metrics, "spec_decode_num_accepted_tokens_total", drafter="ngram") == 5_000 + MOST_POSITIONS
    last = str(MOST_POSITIONS - 1)
    assert value(metrics, "spec_decode_num_accepted_tokens_per_pos_total", drafter="ngram", position=last) == 2


def test_reasons_are_bounded() -> None:
    metrics = ServerMetrics("m")
    assert value(metrics, "request_success_total", finished_reason="stop") == 0
    for i in range(100):
        metrics.observe_finished(f"reason {i}", 1, 1, 0.1, 0.0)
    metrics.observe_finished("stop", 1, 1, 0.1, 0.0)
    counts = {dict(labels)["finished_reason"]: n for (name, labels), n in scraped(metrics).items() if "success" in name}
    assert len(counts) == MOST_REASONS + 1
    assert sum(counts.values()) == 101
    assert counts["stop"] == 1
    assert counts["other"] > 80


def test_a_request_from_arrival_to_end() -> None:
    metrics = ServerMetrics("m")
    metrics.set_load(3, 2, 0.25)
    metrics.observe_prefix(100, 64)
    metrics.observe_first_token(0.02)
    metrics.observe_tokens(1, None)
    metrics.observe_tokens(5, 0.02)  # five tokens of 4 ms each
    metrics.observe_finished("length", 100, 6, 0.05, 0.007)
    assert value(metrics, "num_requests_running") == 3
    assert value(metrics, "num_requests_waiting") == 2
    assert value(metrics, "kv_cache_usage_perc") == 0.25
    assert value(metrics, "prefix_cache_queries_total") == 100
    assert value(metrics, "prefix_cache_hits_total") == 64
    assert value(metrics, "prompt_tokens_total") == 100
    assert value(metrics, "generation_tokens_total") == 6
    assert value(metrics, "request_success_total", finished_reason="length") == 1
    for name, count, total in (
        ("time_to_first_token_seconds", 1, 0.02),
        ("inter_token_latency_seconds", 5, 0.02),
        ("e2e_request_latency_seconds", 1, 0.05),
        ("request_queue_time_seconds", 1, 0.007),
        ("request_prompt_tokens", 1, 100),
        ("request_generation_tokens", 1, 6),
    ):
        assert value(metrics, f"{name}_count") == count
        assert value(metrics, f"{name}_sum") == pytest.approx(total)
    assert value(metrics, "inter_token_latency_seconds_bucket", le="0.0025") == 0
    assert value(metrics, "inter_token_latency_seconds_bucket", le="0.005") == 5
    assert value(metrics, "inter_token_latency_seconds_bucket", le="+Inf") == 5


def test_a_tally_counts_as_prometheus_does() -> None:
    """The same values in Prometheus's own histogram, with values on a bound, beyond all of them and NaN."""
    from prometheus_client import CollectorRegistry, Histogram

    registry = CollectorRegistry()
    theirs = Histogram("h", "h", buckets=INTER_TOKEN_BUCKETS, registry=registry)
    ours = Tally(INTER_TOKEN_BUCKETS)
    for seconds, times in ((0.005, 3), (0.0051, 1), (0.0, 2), (99.0, 1), (-1.0, 1), (10.0, 2)):
        ours.add(seconds, times)
        for _ in range(times):
            theirs.observe(seconds)
    ours.add(float("nan"))
    counts, total = ours.snapshot()
    for bound, count in ours.cumulative(counts):
        assert registry.get_sample_value("h_bucket", {"le": bound}) == count
    assert registry.get_sample_value("h_sum") == pytest.approx(total)


def test_every_metric_has_a_help_text_and_is_exported() -> None:
    families = {family.name: family for family in ServerMetrics("m").collect()}
    assert set(families) == {PREFIX + name for name in HELP}
    assert all(family.documentation for family in families.values())


def test_servers_in_one_process_count_apart() -> None:
    one, other = ServerMetrics("one"), ServerMetrics("other")
    one.observe_tokens(7, None)
    assert value(one, "generation_tokens_total") == 7
    assert value(other, "generation_tokens_total") == 0


def test_a_model_may_have_any_name() -> None:
    metrics = ServerMetrics('org/"mo\\del"\n é')
    assert value(metrics, "num_requests_running") == 0


def test_nothing_is_lost_when_threads_count_together() -> None:
    metrics, errors = ServerMetrics("m"), []

    def work(name: str) -> None:
        for _ in range(4000):
            metrics.observe_round(name, 3, 2)
            metrics.observe_tokens(3, 0.003)
            metrics.observe_finished(name, 1, 3, 0.1, 0.0)

    def scrape() -> None:
        for _ in range(20):
            series = scraped(metrics)
            for name in ("a", "early_exit"):
                labels = frozenset({("drafter", name)})
                tokens = series.get(("spec_decode_num_draft_tokens_total", labels), 0)
                if tokens != 3 * series.get(("spec_decode_num_drafts_total", labels), 0):
                    errors.append(name)  # rounds of two moments

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "early_exit", "early_exit")]
    threads.append(threading.Thread(target=scrape))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert value(metrics, "spec_decode_num_accepted_tokens_total", drafter="early_exit") == 2 * 2 * 4000
    assert value(metrics, "spec_decode_num_accepted_tokens_total", drafter="a") == 2 * 4000
    assert value(metrics, "inter_token_latency_seconds_count") == 3 * 3 * 4000
    assert value(metrics, "request_success_total", finished_reason="a") == 4000


def test_reporting_a_round_costs_microseconds() -> None:
    metrics = ServerMetrics("m")
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(500):
            metrics.observe_round("early_exit", 4, 3)
            metrics.observe_tokens(4, 0.004)
        best = min(best, (time.perf_counter() - start) / 500)
    assert best < 20e-6


def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    modules: dict[str, Any] = sys.modules
    monkeypatch.setitem(modules, "prometheus_client", None)
    with pytest.raises(ValueError, match=r"pip install 'layerskip\[serve\]'"):
        ServerMetrics("m")
