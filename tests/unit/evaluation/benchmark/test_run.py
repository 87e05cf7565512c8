"""Benchmarks: all strategies write the same text, figures are those of the samples, interrupted runs go on."""

from pathlib import Path
from typing import Any

import pytest

from layerskip.decoding.config import GenerationConfig
from layerskip.errors import InvalidArgumentError
from layerskip.evaluation.benchmark.run import BenchmarkWork, benchmark
from layerskip.evaluation.benchmark.runners import STRATEGIES, make_runners
from layerskip.evaluation.benchmark.summary import empty_note, speedup_interval, summarize
from layerskip.evaluation.data.datasets import Example
from layerskip.evaluation.run_folder import RunFolder
from layerskip.language_model import LanguageModel

CONFIG = GenerationConfig(max_new_tokens=20, do_sample=False, exit_layer=2, num_speculations=3)
EXAMPLES = [
    Example(index=i, prompt=text, reference=reference)
    for i, (text, reference) in enumerate([("abc the", "the cab"), ("cab,", None), ("é the ab", "ab")])
]


def work(lm: LanguageModel, *strategies: str) -> BenchmarkWork:
    return BenchmarkWork(load=lambda: lm, strategies=strategies, config=CONFIG, dataset="custom_jsonl")


def sample(tokens: int, seconds: float, **stats: Any) -> dict[str, Any]:
    figures = {"tokens": tokens, "seconds": seconds, "time_to_first_token_s": 0.0, **stats}
    return {"text": "", "reference": None, "metrics": {}, "memory_bytes": 1, "options": {}, "stats": figures}


def test_strategies_side_by_side(text_lm: LanguageModel, tmp_path: Path) -> None:
    run = RunFolder(tmp_path, "benchmark", {})
    results = benchmark(work(text_lm, *STRATEGIES), EXAMPLES, run)
    rows = {row["name"]: row for row in results["strategies"]}
    assert list(rows) == list(STRATEGIES)
    texts: dict[str, set[tuple[int, ...]]] = {}
    for found in run.samples.values():
        texts.setdefault(found["strategy"], set()).add(tuple(found["token_ids"]))
        if "pieces" in found:
            assert "".join(text for text, _ in found["pieces"]) == found["text"]
        assert found["memory_bytes"] > 0
    early = texts.pop("early_exit")
    assert all(found == texts["autoregressive"] for found in texts.values())  # transformers' own included
    assert early != texts["autoregressive"]
    assert rows["autoregressive"]["speedup"] == 1.0
    speculative = rows["self_speculative"]
    assert speculative["speedup_low"] <= speculative["speedup"] <= speculative["speedup_high"]
    assert len(speculative["drafted_by_position"]) == 3
    assert speculative["options"]["exit_layer"] == 2
    assert speculative["acceptance_rate"] == sum(speculative["accepted_by_position"]) / sum(
        speculative["drafted_by_position"]
    )
    assert set(speculative["metrics"]) >= {"rouge1", "rougeL", "bleu"}
    assert rows["transformers"]["time_to_first_token_s"]["median"] > 0


def test_an_interrupted_benchmark_goes_on(text_lm: LanguageModel, tmp_path: Path) -> None:
    names = ("autoregressive", "self_speculative")

    def stop_at_three(what: str, done: int, total: int | None) -> None:
        assert total == len(EXAMPLES) * len(names)
        if done == 3:
            raise KeyboardInterrupt

    both = work(text_lm, *names)
    with pytest.raises(KeyboardInterrupt):
        benchmark(both, EXAMPLES, RunFolder(tmp_path, "b", {}), on_progress=stop_at_three)
    run = RunFolder(tmp_path, "b", {})
    before = dict(run.samples)
    assert len(before) == 3
    results = benchmark(both, EXAMPLES, run)
    assert len(run.samples) == 6
    assert {key: run.samples[key] for key in before} == before
    again = benchmark(both, EXAMPLES, RunFolder(tmp_path, "b", {}))
    assert again == results


def test_figures_of_samples() -> None:
    ours = [
        sample(11, 1.0, time_to_first_token_s=0.5, drafted=8, accepted=6, rounds=4, drafted_by_position=[4, 4],
               accepted_by_position=[4, 2]),
        sample(1, 0.25, time_to_first_token_s=0.25, drafted=0, accepted=0, rounds=0),
        sample(21, 3.5, time_to_first_token_s=0.5, drafted=8, accepted=2, rounds=8, drafted_by_position=[8],
               accepted_by_position=[2]),
    ]  # fmt: skip
    (row,) = summarize("custom_jsonl", {"adaptive": ours})["strategies"]
    assert row["speedup"] is None
    assert row["tokens"] == 33
    assert row["tokens_per_second"] == pytest.approx(33 / 4.75)
    assert row["time_to_first_token_s"]["median"] == 0.5
    assert row["time_per_token_s"] == {"median": pytest.approx(0.1), "p95": pytest.approx(0.145)}
    assert row["acceptance_rate"] == 0.5
    assert row["mean_accepted_length"] == pytest.approx(30 / 12)
    assert row["drafted_by_position"] == [12, 4]
    assert row["accepted_by_position"] == [6, 2]


def test_texts_that_end_at_once() -> None:
    written = [{**sample(4, 1.0), "text": "abc"}, {**sample(4, 1.0), "text": "x"}]
    ended = [{**sample(1, 0.5), "text": " \n"}, {**sample(4, 1.0), "text": "x"}]
    rows = summarize("custom_jsonl", {"autoregressive": written, "adaptive": ended})["strategies"]
    assert [row["empty_texts"] for row in rows] == [0, 1]
    assert (empty_note(rows) or "").startswith("1 of 2 texts of adaptive are empty")
    assert empty_note(rows[:1]) is None


def test_intervals_of_speedups() -> None:
    plain = [sample(10, seconds) for seconds in (1.0, 2.0, 4.0, 1.5)]
    twice = [sample(10, seconds / 2) for seconds in (1.0, 2.0, 4.0, 1.5)]
    assert speedup_interval(twice, plain) == pytest.approx((2.0, 2.0, 2.0))
    mixed = [sample(10, seconds) for seconds in (0.5, 2.0, 1.0, 1.5)]
    low, ratio, high = speedup_interval(mixed, plain)
    assert ratio == pytest.approx(8.5 / 5)
    assert 1.0 <= low < ratio < high <= 4.0
    assert speedup_interval(mixed, plain) == (low, ratio, high)


def test_strategies_that_cannot_be(text_lm: LanguageModel) -> None:
    for names, message in ((["fast"], "'fast' is not known"), ([], "none"), (["ngram", "ngram"], "once each")):
        with pytest.raises(InvalidArgumentError, match=message):
            make_runners(text_lm, names, CONFIG)
