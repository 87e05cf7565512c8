"""Work that is shared out over a Ray cluster on this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from layerskip.batch.lines import Line, read_lines
from layerskip.batch.results import PartialResults
from layerskip.batch.run import run_batch
from layerskip.batch.worker import BatchWork
from layerskip.decoding.config import GenerationConfig
from layerskip.errors import InvalidArgumentError, LayerSkipError, PromptError
from layerskip.language_model import load
from layerskip.workers.fan_out import Worker
from layerskip.workers.ray import MAX_RETRIES, ray_mapper, share_out

CONFIG = GenerationConfig(max_new_tokens=24, temperature=0.8, seed=5, ignore_eos=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster with two cores that this process has joined."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield ray
        ray.shutdown()


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint(tokenizer=True)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"def f{i}({'a, ' * (i % 5)}b):"}) + "\n" for i in range(12)))
    return file


def texts(output: Path) -> list[tuple[int, list[int]]]:
    records = [json.loads(line) for line in output.read_bytes().splitlines()]
    return [(record["index"], record["token_ids"]) for record in records]


def work_of(model: Path, batch_size: int) -> BatchWork:
    return BatchWork(load=partial(load, str(model)), config=CONFIG, seed=5, batch_size=batch_size)


def expected_texts(model: Path, prompts: Path, output: Path) -> list[tuple[int, list[int]]]:
    """What a single process writes."""
    run_batch(work_of(model, 3), read_lines(prompts)[0], PartialResults(output, CONFIG, {}))
    return texts(output)


def mapped(items: list[Any], make_worker: Callable[[], Worker], num_workers: int | None) -> list[Any]:
    """All results, as a cluster's workers return them."""
    with ray_mapper(num_workers=num_workers, most_items=len(items)) as mapper:
        return list(mapper(items, make_worker))


@pytest.mark.slow
def test_two_workers_write_the_texts_of_one_process(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    command = "import sys; from layerskip.cli.batch import run; sys.exit(run(sys.argv[1:]))"
    flags = f"--model {model.name} --input {prompts} --output-file {tmp_path / 'ray.jsonl'} --batch-size 2 --json --ray"
    flags += " --num-workers 2 --max-new-tokens 24 --temperature 0.8 --seed 5 --ignore-eos"
    result = subprocess.run(
        [sys.executable, "-c", command, *flags.split()], cwd=model.parent, capture_output=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr.decode()
    assert json.loads(result.stdout)["tokens"] == 12 * 24
    assert texts(tmp_path / "ray.jsonl") == expected_texts(model, prompts, tmp_path / "one.jsonl")


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(cluster: Any, model: Path, prompts: Path, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    pids.mkdir()

    def slowly(make_worker: Callable[[], Worker]) -> Worker:
        decode = make_worker()

        def work(lines: list[Line]) -> Any:
            (pids / f"{os.getpid()}-{lines[0].index}").touch()
            time.sleep(0.5)  # time to be killed in
            return decode(lines)

        return work

    killed: list[int] = []

    def kills(batches: Any, make_worker: Callable[[], Worker]) -> Iterator[Any]:
        with ray_mapper(num_workers=2, most_items=12) as mapper:
            for records in mapper(batches, partial(slowly, make_worker)):
                if not killed:
                    time.sleep(0.1)  # both are at their next items
                    killed.append(int(max(pids.iterdir(), key=lambda path: path.stat().st_mtime).name.split("-")[0]))
                    os.kill(killed[0], signal.SIGKILL)
                yield records

    results = PartialResults(tmp_path / "ray.jsonl", CONFIG, {})
    summary = run_batch(work_of(model, 1), read_lines(prompts)[0], results, mapper=kills, group_size=1)
    assert texts(tmp_path / "ray.jsonl") == expected_texts(model, prompts, tmp_path / "one.jsonl")
    assert summary.tokens == 12 * 24
    workers = {path.name.split("-")[0] for path in pids.iterdir()}
    runs = [path.name.split("-")[1] for path in pids.iterdir()]
    assert len(workers) == 3  # the killed one, its successor, and the other one
    assert len(runs) == 13  # the item that it was at was run twice


def test_workers_that_stay(cluster: Any, tmp_path: Path) -> None:
    def make_worker() -> Worker:
        (tmp_path / str(os.getpid())).touch()
        return lambda item: [(os.getpid(), item), (os.getpid(), -item)]

    def make_other() -> Worker:
        return lambda item: [(os.getpid(), item)]

    with ray_mapper(num_workers=1, most_items=9) as mapper:
        first = list(mapper([10, 11, 12, 13], make_worker))
        early = mapper([20, 21, 22], make_worker)
        next(early)
        early.close()  # what was under way is nobody's any more
        second = list(mapper([30, 31], make_worker))
        assert list(mapper([], make_other)) == []
        assert len(list(tmp_path.iterdir())) == 1
        (other,) = mapper([40], make_other)
    assert [item for _, item in first] == [10, -10, 11, -11, 12, -12, 13, -13]
    assert [item for _, item in second] == [30, -30, 31, -31]
    (started,) = (int(path.name) for path in tmp_path.iterdir())
    assert {process for process, _ in [*first, *second]} == {started}
    assert other[0] != started


def test_results_come_as_they_are_done(cluster: Any) -> None:
    def make_worker() -> Worker:
        def work(seconds: float) -> Iterator[tuple[float, float]]:
            time.sleep(seconds)
            yield seconds, time.time()

        return work

    results = []
    with ray_mapper(num_workers=2, most_items=4) as mapper:
        for seconds, done in mapper([1.5, 0.0, 0.1, 0.2], make_worker):
            results.append((seconds, done, time.time() - done))
    assert sorted(seconds for seconds, _, _ in results) == [0.0, 0.1, 0.2, 1.5]
    assert results[0][0] != 1.5
    assert [done for _, done, _ in results] == sorted(done for _, done, _ in results)
    assert all(delay < 0.5 for _, _, delay in results)


def test_what_a_worker_raises_arrives(cluster: Any) -> None:
    def make_worker() -> Worker:
        def work(item: int) -> Iterator[int]:
            if item == 1:
                raise PromptError("prompt 1 is odd")
            yield 1 // (item - 2)

        return work

    def make_nothing() -> Worker:
        raise PromptError("no model")

    with pytest.raises(PromptError, match="prompt 1 is odd"):
        mapped([0, 1], make_worker, 1)
    with pytest.raises(RuntimeError, match=r"a worker failed:[\s\S]*ZeroDivisionError"):
        mapped([2], make_worker, 1)
    with pytest.raises(PromptError, match="no model"):
        mapped([0], make_nothing, 1)


@pytest.mark.slow
def test_an_item_that_kills_its_workers_comes_to_an_end(cluster: Any, tmp_path: Path) -> None:
    def make_worker() -> Worker:
        def work(item: int) -> list[int]:
            (tmp_path / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
            return [item]

        return work

    with pytest.raises(LayerSkipError, match="gave up on item 0"):
        mapped([0], make_worker, 1)
    assert 1 < len(list(tmp_path.iterdir())) <= 1 + MAX_RETRIES  # a retry may also meet a worker that has just died


def test_a_cluster_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # another test's cluster may be joined
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(InvalidArgumentError, match=r"RAY_ADDRESS '127.0.0.1:1' can't be joined: .*refused"):
        mapped([1], lambda: range, None)


@pytest.mark.slow
def test_a_cluster_that_others_started() -> None:
    """`ray start`, a process that joins by RAY_ADDRESS, and a cluster that goes on without it."""
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
    }
    here = Path(sys.executable).parent / "ray"
    start = [here, "start", "--head", f"--port={port}", "--num-cpus=2", "--include-dashboard=false", "--block"]
    starting = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}
    script = (
        "from layerskip.workers.ray import ray_mapper\n"
        "with ray_mapper(num_workers=2, most_items=3) as mapper:\n"
        "    print(sorted(mapper(['1', '23', '4'], lambda: list)))"
    )
    head = subprocess.Popen(start, env=starting, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end and socket.socket().connect_ex(("127.0.0.1", port)):
            time.sleep(0.2)
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, "-c", script],
                env=environment,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert done.stdout == "['1', '2', '3', '4']\n", done.stderr
    finally:
        head.terminate()
        head.wait(timeout=60)


def test_too_many_workers_are_refused(cluster: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="has 2 CPU cores, and 3 workers need one each"):
        mapped([1, 2, 3], lambda: range, 3)
    with pytest.raises(InvalidArgumentError, match="num_workers must be at least 1, got 0"):
        mapped([1], lambda: range, 0)
    assert mapped([], lambda: range, None) == []


@pytest.mark.parametrize(
    ("nodes", "num_workers", "num_items", "gpus", "shared"),
    [
        ([{"CPU": 8}], None, 100, False, (8, 1)),
        ([{"CPU": 8}], 3, 100, False, (3, 2)),
        ([{"CPU": 8}], 3, 1, False, (1, 8)),
        ([{"CPU": 8}, {"CPU": 3}], 3, 100, False, (3, 3)),
        ([{"CPU": 8}, {}], 1, 100, False, (1, 8)),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 64}], None, 100, True, (2, 4)),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 64, "GPU": 1}], 2, 100, True, (2, 8)),
    ],
)
def test_cores_are_shared_out(
    nodes: list[dict[str, float]], num_workers: int | None, num_items: int, gpus: bool, shared: tuple[int, int]
) -> None:
    assert share_out(nodes, num_workers, num_items, gpus=gpus) == shared


@pytest.mark.parametrize(("nodes", "gpus"), [([{"CPU": 2, "GPU": 1}], True), ([{"GPU": 4}], True), ([], False)])
def test_workers_without_room_are_refused(nodes: list[dict[str, float]], gpus: bool) -> None:
    with pytest.raises(InvalidArgumentError, match="the Ray cluster has"):
        share_out(nodes, 2, 100, gpus=gpus)
