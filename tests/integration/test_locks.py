"""Two runs that write to the same place: the second is refused in one line, whatever became of the first."""

import errno
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from layerskip.batch.results import PartialResults
from layerskip.cli.main import main
from layerskip.errors import InvalidArgumentError
from layerskip.evaluation.run_folder import RunFolder, open_run_folder
from layerskip.locks import Lock

HOLD = """
import sys, time
from pathlib import Path
from layerskip.locks import Lock
lock = Lock(Path(sys.argv[1]), "it")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder() -> Iterator[Callable[[Path], "subprocess.Popen[str]"]]:
    """Starts another process that holds a lock."""
    started: list[subprocess.Popen[str]] = []

    def start(file: Path) -> "subprocess.Popen[str]":
        file.parent.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def commands(tmp_path: Path, training_start: Callable[..., tuple[Path, Path]]) -> dict[str, tuple[Path, list[str]]]:
    """The lock file and the command line of everything that writes results."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "def f(x):"}\n{"prompt": "class A:"}\n')
    shape, texts = training_start(texts=3, num_hidden_layers=2)
    data = ["--dataset", "custom_jsonl", "--data-path", str(prompts), "--max-new-tokens", "2"]
    run, batch = tmp_path / "run", tmp_path / "out.jsonl"
    folder = ["--output-dir", str(run)]
    grid = ["--exit-layer-first", "4", "--exit-layer-last", "4", "--num-speculations-last", "2"]
    steps = "--sequence-length 32 --batch-size 2 --max-steps 1 --held-out 0 --precision float32".split()
    return {
        "batch": (
            tmp_path / ".out.jsonl.lock",
            ["batch", "--input", str(prompts), "--output-file", str(batch), "--max-new-tokens", "2"],
        ),
        "benchmark": (run / ".lock", ["benchmark", *data, "--strategies", "autoregressive", *folder]),
        "sweep": (run / ".lock", ["sweep", *data, *grid, *folder]),
        "verify": (run / ".lock", ["verify", *data, "--exit-layers", "4", "--num-speculations", "2", *folder]),
        "train": (run / ".lock", ["train", "--config", str(shape), "--data", str(texts), *steps, "--output", str(run)]),
    }


@pytest.mark.parametrize("name", ["batch", "benchmark", "sweep", "verify", "train"])
def test_the_second_is_refused(
    tmp_path: Path,
    training_start: Callable[..., tuple[Path, Path]],
    holder: Callable[[Path], "subprocess.Popen[str]"],
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    file, command = commands(tmp_path, training_start)[name]
    process = holder(file)
    capsys.readouterr()
    assert main(command) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "is in use by another run of layerskip" in told
    process.send_signal(signal.SIGKILL)  # which leaves the lock's file behind
    process.wait()
    assert file.exists()
    assert main(command) == 0
    assert not file.exists()


def test_two_batches_at_once(tmp_path: Path) -> None:
    """Real processes: one writes the whole output, the other is refused."""
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(f'{{"prompt": "def f{i}("}}\n' for i in range(40)))
    command = [sys.executable, "-m", "layerskip", "batch", "--input", str(prompts), "--output-file", str(output)]
    command += ["--max-new-tokens", "48", "--batch-size", "1", "--no-sample"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=120)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], told
    assert "is in use by another run" in told[codes.index(2)] or "exists already" in told[codes.index(2)]
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(40))


def test_a_partial_file_that_others_changed(tmp_path: Path) -> None:
    from layerskip.decoding.config import GenerationConfig

    results = PartialResults(tmp_path / "out.jsonl", GenerationConfig(), {})
    results.add([{"index": 0, "text": "a"}, {"index": 1, "text": "b"}])
    content = results.path.read_bytes()
    results.path.write_bytes(content.replace(b'"index": 1', b'"index": 7'))
    with pytest.raises(InvalidArgumentError, match="where prompt 1 was written stands something else"):
        results.finish()
    assert not results.output.exists()
    results.path.write_bytes(content)
    results.finish()
    assert len(results.output.read_text().splitlines()) == 2


def test_a_lock_is_let_go(tmp_path: Path) -> None:
    """After a block that fails too, while somebody still looks at the error."""

    def interrupted() -> None:
        with open_run_folder(tmp_path, "verify", {"a": 1}):
            with pytest.raises(InvalidArgumentError, match="is in use"):
                open_run_folder(tmp_path, "verify", {"a": 1}).__enter__()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as interrupt:
        interrupted()
    assert interrupt.traceback
    assert list(tmp_path.iterdir()) == []
    lock = Lock(tmp_path / ".lock", "x")
    lock.release()
    lock.release()


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs work there, with whatever the installed filelock does in place of the system's locks."""
    fcntl = pytest.importorskip("fcntl")
    asked = []

    def cannot_lock(*arguments: object) -> None:
        asked.append(arguments)
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", cannot_lock)
    with open_run_folder(tmp_path / "run", "verify", {"a": 1}) as run:
        run.add("0", {})
    assert asked
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["run.json", "samples.jsonl"]


def test_a_file_system_without_locks_in_filelock_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs work there as they would without locks: nothing is protected, and nothing fails."""

    def cannot_lock(*_: object, **__: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(FileLock, "acquire", cannot_lock)
    file = tmp_path / ".lock"
    with Lock(file, "x") as first, Lock(file, "x") as second:
        first.release()
        second.release()
    with open_run_folder(tmp_path / "run", "verify", {"a": 1}) as run:
        run.add("0", {})
    assert not file.exists()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["run.json", "samples.jsonl"]


def test_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "verify", {})
    content = folder.finish({"speed": float("nan"), "parts": [float("inf"), {"x": -float("inf"), "y": 1.5}]})
    assert content["results"] == {"speed": None, "parts": [None, {"x": None, "y": 1.5}]}
    json.loads((tmp_path / "results.json").read_text(), parse_constant=lambda name: pytest.fail(name))
