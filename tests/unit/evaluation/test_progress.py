"""How far a measurement is, as its callers are told."""

from layerskip.evaluation.progress import Meter


def test_a_meter_tells_of_everything_that_is_done() -> None:
    told: list[tuple[str, int, int | None]] = []
    meter = Meter(lambda *step: told.append(step), 5)
    meter.advance("reading", 3)
    meter.advance("reading", 0)
    meter.advance("writing")
    assert told == [("reading", 3, 5), ("reading", 3, 5), ("writing", 4, 5)]
