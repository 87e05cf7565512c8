"""How often drafts hold, tracked."""

import pytest

from layerskip.decoding.adaptive.rates import PRIOR_RATE, AcceptanceRates, ExitRates, Rate
from layerskip.model.drafts import CONFIDENCE_CLASSES, confidence_class


def test_a_rate_moves_from_the_prior_to_what_is_seen() -> None:
    rate = Rate()
    assert rate.value == PRIOR_RATE
    rate.observe(1, 1)
    assert PRIOR_RATE < rate.value < 0.9
    for _ in range(200):
        rate.observe(1, 1)
    assert rate.value > 0.97


def test_the_present_text_counts_more_and_the_next_starts_from_the_long_memory() -> None:
    rate = Rate()
    for _ in range(400):
        rate.observe(9, 10)
    for _ in range(10):
        rate.observe(0, 4)
    assert rate.value < 0.45
    rate.forget_recent()
    assert 0.75 < rate.value < 0.9


def test_nothing_tried_teaches_nothing() -> None:
    rates = ExitRates()
    rates.observe(0, 0, ())
    assert rates.overall.value == PRIOR_RATE


def test_drafts_behind_a_rejected_one_are_not_counted() -> None:
    rates = ExitRates()
    rates.observe(2, 8, [0.9] * 8)
    assert rates.overall.long.tried == pytest.approx(3)
    assert rates.overall.long.accepted == pytest.approx(2)
    assert [rate.long.tried for rate in rates.depths] == [1, 1, 1]
    assert sum(rate.long.tried for rate in rates.classes) == pytest.approx(3, rel=0.01)


def test_chances_fall_with_depth_by_the_rates_of_each() -> None:
    rates = ExitRates()
    for _ in range(300):
        rates.observe(1, 2, ())  # the first always holds, the second never
    chances = list(rates.chances(4))
    assert chances[0] > 0.95
    assert chances[1] < 0.1
    assert chances == sorted(chances, reverse=True)


def test_confidence_tells_good_drafts_from_bad_ones() -> None:
    rates = ExitRates()
    for _ in range(100):
        rates.observe(1, 2, [0.99, 0.2])
    found = rates.by_confidence()
    assert found[confidence_class(0.99)] > 0.9
    assert found[confidence_class(0.2)] < 0.1


@pytest.mark.parametrize("confidence", [0.0, 0.1, 0.35, 0.36, 0.5, 0.7, 0.9, 0.94, 0.999, 1.0])
def test_classes(confidence: float) -> None:
    assert 0 <= confidence_class(confidence) < CONFIDENCE_CLASSES
    assert confidence_class(confidence) <= confidence_class(min(1.0, confidence + 0.1))


def test_probes_and_matches() -> None:
    rates = AcceptanceRates()
    for _ in range(20):
        rates.observe_exits({2: (0.0, 4), 4: (4.0, 4)})
        rates.of_match(5).observe(1, 1)
        rates.of_match(2).observe(0, 1)
    assert rates.of_exit(2).overall.value < 0.1 < 0.9 < rates.of_exit(4).overall.value
    assert rates.of_match(2).value < 0.3 < 0.8 < rates.of_match(5).value
    assert rates.of_match(100) is rates.of_match(16)


def test_further_drafts_of_a_match_have_a_rate_of_their_own() -> None:
    """Plain steps say how often the first holds, and nothing of those after it."""
    rates = AcceptanceRates()
    for _ in range(100):
        rates.observe_match(6, 1, 1)
    assert rates.of_match(6).value > 0.95
    assert rates.of_match(6, further=True).value == PRIOR_RATE
    for _ in range(100):
        rates.observe_match(6, 3, 4)
    first, further = rates.of_match(6).value, rates.of_match(6, further=True).value
    assert further == pytest.approx(2 / 3, abs=0.03)
    assert rates.match_chances(6, 3) == pytest.approx([first, first * further, first * further**2])


def test_classes_of_drafts_are_counted_whether_verified_or_not() -> None:
    rates = ExitRates()
    assert rates.shares() == pytest.approx([1 / CONFIDENCE_CLASSES] * CONFIDENCE_CLASSES)
    for _ in range(60):
        rates.observe(1, 1, [0.99, 0.2])  # the second draft was given up
    shares = rates.shares()
    assert sum(shares) == pytest.approx(1)
    assert shares[-1] == pytest.approx(shares[0], rel=0.05)
    assert shares[-1] > 0.4
    assert rates.classes[0].long.tried == 0
