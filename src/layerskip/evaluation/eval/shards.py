"""An evaluation's requests, shared out: each worker answers those whose key falls to it.

A worker runs the tasks with placeholder answers for all other requests, and its scores are thrown away. Once the run's
folder has all answers, the tasks are run with those, which takes no model.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerskip.evaluation.progress import Meter, Progress, ignore_progress
from layerskip.evaluation.run_folder import RunFolder
from layerskip.evaluation.samples import SampleStore
from layerskip.language_model import LanguageModel
from layerskip.workers.fan_out import Mapper

NOTHING: Mapping[str, Any] = {
    **{"text": "", "tokens": 0, "rounds": 0, "drafted": 0, "accepted": 0},
    **{"logprob": 0.0, "is_greedy": False, "tokens_scored": 0, "seconds": 0.0},
}
"""Placeholder answer to a request of another worker."""
SHARDS_A_WORKER = 4
"""More shards than workers, so that none waits long for the last one."""
USUAL_WORKERS = 4


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Which requests a worker answers, at all exits."""

    number: int
    of: int
    finished: frozenset[str]
    """Keys that need no answer any more."""

    def has(self, key: str) -> bool:
        """Whether a request is this shard's, and is open."""
        return key not in self.finished and int(key.rpartition("/")[2][:8], 16) % self.of == self.number


class ShardStore(SampleStore):
    """Answers of one shard; any other request counts as answered, with `NOTHING`."""

    def __init__(self, shard: Shard) -> None:
        """No answers yet."""
        super().__init__()
        self.samples = _Answers(shard)


class _Answers(dict[str, dict[str, Any]]):
    """A shard's own answers, and `NOTHING` for all others."""

    def __init__(self, shard: Shard) -> None:
        super().__init__()
        self._shard = shard

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or not self._shard.has(str(key))

    def __missing__(self, key: str) -> dict[str, Any]:
        return dict(NOTHING)


@dataclass(frozen=True, kw_only=True)
class EvalWork:
    """What a worker is told; pickles."""

    load: Callable[[], LanguageModel]
    """Makes the model."""
    tasks: tuple[str, ...]
    include_path: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `evaluate`."""

    def start(self) -> Callable[[Shard], Iterator[tuple[str, dict[str, Any]]]]:
        """A worker, with its model loaded: from a shard to keys and answers."""
        from layerskip.evaluation.eval.run import evaluate, find_tasks

        lm, tasks = self.load(), find_tasks(self.tasks, self.include_path)

        def answer(shard: Shard) -> Iterator[tuple[str, dict[str, Any]]]:
            store = ShardStore(shard)
            evaluate(lm, tasks, store=store, **self.options)
            yield from store.samples.items()

        return answer


def number_of_shards(num_workers: int | None) -> int:
    """Parts that requests are shared out in, for some workers if their number isn't known."""
    return SHARDS_A_WORKER * (num_workers or USUAL_WORKERS)


def answer_elsewhere(
    work: EvalWork,
    run: RunFolder,
    mapper: Mapper,
    num_shards: int,
    *,
    on_progress: Progress = ignore_progress,
) -> None:
    """Have all open requests answered by a mapper's workers, into the run's folder.

    Args:
        work: How.
        run: Keeps the answers.
        mapper: Where the work is done.
        num_shards: From `number_of_shards`.
        on_progress: Told of every answer; how many there will be isn't known.
    """
    finished = frozenset(run.samples)
    meter = Meter(on_progress, total=None)
    meter.advance("starting workers", len(finished))
    shards = [Shard(number=number, of=num_shards, finished=finished) for number in range(num_shards)]
    for key, answer in mapper(shards, work.start):
        run.add(key, answer)
        meter.advance("answering")
