"""Work in this process, and what is loaded once."""

import pickle
from collections.abc import Iterator

from layerskip.workers.fan_out import LoadOnce, Worker, in_process


def test_results_come_while_an_item_is_worked_at() -> None:
    log: list[str] = []

    def make_worker() -> Worker:
        log.append("made")

        def work(item: int) -> Iterator[int]:
            for step in range(2):
                log.append(f"{item}.{step}")
                yield 10 * item + step

        return work

    results = in_process([1, 2], make_worker)
    assert log == []
    assert next(results) == 10
    assert log == ["made", "1.0"]
    assert list(results) == [11, 20, 21]
    assert log.count("made") == 1


def test_without_items_no_worker_is_made() -> None:
    def make_worker() -> Worker:
        raise AssertionError

    assert list(in_process([], make_worker)) == []


def test_what_is_loaded_once_is_not_pickled() -> None:
    load = LoadOnce(list)
    assert load() is load()
    load().append(1)
    assert pickle.loads(pickle.dumps(load))() == []
