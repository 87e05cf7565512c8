"""Statistics of a generation."""

import time

import pytest

from layerskip.decoding.stats import StatsRecorder
from layerskip.language_model import LanguageModel


def test_rounds_are_counted_by_position() -> None:
    recorder = StatsRecorder()
    recorder.record_round(3, 2)
    recorder.record_round(3, 0)
    recorder.record_round(1, 1)
    recorder.record_round(0, 0)
    stats = recorder.finish(prompt_tokens=5, tokens=8)
    assert stats.drafted_by_position == (3, 2, 2)
    assert stats.accepted_by_position == (2, 1, 0)
    assert (stats.drafted, stats.accepted, stats.rounds) == (7, 3, 4)
    assert stats.acceptance_rate == pytest.approx(3 / 7)
    assert stats.mean_accepted_length == pytest.approx(7 / 4)


def test_a_round_that_is_cut_loses_its_last_drafts() -> None:
    recorder = StatsRecorder()
    recorder.begin_step(7)
    recorder.record_round(4, 3, start=10)
    recorder.begin_step(5)
    recorder.record_round(4, 3, start=14)
    recorder.record_round(4, 2, start=18)
    recorder.cut(30)
    assert recorder.accepted_by_position == [3, 3, 2, 0]
    for _ in range(2):
        recorder.cut(19)
        assert recorder.accepted_by_position == [3, 2, 2, 0]
    recorder.cut(15)  # in an earlier round of the same step
    assert recorder.accepted_by_position == [2, 1, 1, 0]
    recorder.cut(0)  # what earlier steps gave has been told
    assert recorder.accepted_by_position == [1, 1, 1, 0]
    assert recorder.drafted_by_position == [3, 3, 3, 3]
    assert (recorder.rounds, recorder.layer_calls) == (3, 12)


def test_certain_drafts_are_the_grammars() -> None:
    recorder = StatsRecorder()
    recorder.record_round(4, 3, "early_exit", [True, False, True, False])
    recorder.begin_step(0)
    recorder.record_round(2, 2, None, [True, True], start=7)
    stats = recorder.finish(prompt_tokens=1, tokens=8)
    assert stats.drafted_by == {"grammar": 4, "early_exit": 2}
    assert stats.accepted_by == {"grammar": 4, "early_exit": 1}
    recorder.cut(8)
    assert recorder.accepted_by == {"grammar": 3, "early_exit": 1}


def test_without_rounds_nothing_is_divided_by_zero() -> None:
    stats = StatsRecorder().finish(prompt_tokens=1, tokens=0)
    assert (stats.acceptance_rate, stats.mean_accepted_length, stats.drafted_by_position) == (0.0, 0.0, ())
    assert stats.time_to_first_token_s == 0.0


def test_times_run_from_the_start_to_the_last_token() -> None:
    recorder = StatsRecorder(started=100.0)
    recorder.first_token_at, recorder.last_token_at = 100.5, 104.0
    stats = recorder.finish(prompt_tokens=1, tokens=8)
    assert (stats.time_to_first_token_s, stats.seconds, stats.tokens_per_second) == (0.5, 4.0, 2.0)


def test_a_generation_is_measured(text_lm: LanguageModel) -> None:
    time_before = time.perf_counter()
    (result,) = text_lm.generate([[2, 3, 4]], max_new_tokens=20, exit_layer=3)
    elapsed = time.perf_counter() - time_before
    stats = result.stats
    assert (stats.tokens, stats.prompt_tokens, stats.cached_tokens) == (20, 3, 0)
    assert 0 < stats.time_to_first_token_s < stats.seconds < elapsed
    assert stats.tokens_per_second == pytest.approx(20 / stats.seconds)
    assert stats.seconds_drafting > 0
    assert stats.seconds_verifying > 0
    assert stats.seconds_drafting + stats.seconds_verifying < stats.seconds - stats.time_to_first_token_s


def test_plain_decoding_drafts_nothing(text_lm: LanguageModel) -> None:
    (result,) = text_lm.generate([[2, 3, 4]], max_new_tokens=9, generation_strategy="autoregressive")
    stats = result.stats
    assert (stats.drafted, stats.accepted, stats.rounds, stats.mean_accepted_length) == (0, 0, 8, 1.0)
    assert (stats.seconds_drafting, stats.seconds_verifying) == (0.0, 0.0)


def test_the_clock_starts_with_the_work(text_lm: LanguageModel) -> None:
    """A stream that waits before it is read doesn't count the wait."""
    stream = text_lm.stream([[2, 3, 4]], max_new_tokens=2)
    time.sleep(0.5)
    for _ in stream:
        pass
    assert stream.results()[0].stats.seconds < 0.4
