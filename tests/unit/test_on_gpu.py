"""The runner of `benchmarks/on_gpu.py`: limits, failures, what is missing, what it writes. Steps are real processes."""

import json
import os
import subprocess
import sys
import time
import zipfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "on_gpu.py"
WRITES = "import json, sys; open(sys.argv[1], 'w').write(json.dumps({found}))"


@pytest.fixture(scope="module")
def on_gpu() -> ModuleType:
    """The script as a module."""
    spec = spec_from_file_location("on_gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["on_gpu"] = module
    spec.loader.exec_module(module)
    return module


def make_step(on_gpu: ModuleType, name: str, code: str, *, limit_s: float = 30, needs: tuple[str, ...] = ()) -> Any:
    command = (sys.executable, "-c", code)
    return on_gpu.Step(name=name, what=f"{name} of a test", limit_s=limit_s, needs=needs, command=command)


def run(on_gpu: ModuleType, output: Path, *steps: Any, limit_s: float = 60) -> list[Any]:
    outcomes: list[Any] = on_gpu.run_steps(steps, output, environment=os.environ, limit_s=limit_s)
    assert [json.loads(line) for line in (output / "record.jsonl").read_text().splitlines()] == list(
        map(vars, outcomes)
    )
    return outcomes


def ends(process: int, seconds: float = 10) -> bool:
    """Whether a process is gone within some seconds, or a zombie that nobody has collected."""
    status, deadline = Path(f"/proc/{process}/stat"), time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if status.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_a_step_that_passes(on_gpu: ModuleType, tmp_path: Path) -> None:
    code = "print('hello'); " + WRITES.format(found={"problems": [], "figure": 3})
    (outcome,) = run(on_gpu, tmp_path, make_step(on_gpu, "good", code))
    assert (outcome.status, outcome.reason, outcome.result) == ("passed", None, {"figure": 3})
    assert (tmp_path / outcome.log).read_text() == "hello\n"
    assert outcome.cpu_seconds > 0
    assert outcome.seconds < 30


def test_failures_are_told_and_end_nothing(
    on_gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"problems": ["logits differ", "so do texts"]}
    steps = (
        make_step(on_gpu, "crash", "import sys; print('why', file=sys.stderr); sys.exit(3)"),
        make_step(on_gpu, "killed", "import os; os.kill(os.getpid(), 9)"),
        make_step(on_gpu, "wrong", WRITES.format(found=found) + "; sys.exit(1)"),
        make_step(on_gpu, "good", "pass"),
    )
    outcomes = run(on_gpu, tmp_path, *steps)
    assert [x.status for x in outcomes] == ["failed", "failed", "failed", "passed"]
    assert [x.reason for x in outcomes] == ["exit code 3", "exit code -9", "logits differ; so do texts", None]
    assert (tmp_path / outcomes[0].log).read_text() == "why\n"
    assert "crash: failed" in capsys.readouterr().out
    assert on_gpu.last_line(outcomes) == "FAILED: crash, killed, wrong; 1 of 4 steps passed"


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_step_ends_at_its_limit_with_all_it_has_started(
    on_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stubborn: bool
) -> None:
    """What it had found until then is kept."""
    monkeypatch.setattr(on_gpu, "GRACE_S", 0.5)
    ignore = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); " if stubborn else ""
    child = "import time; time.sleep(60)"
    code = (
        f"{ignore}import subprocess, sys, time, json; child = subprocess.Popen([sys.executable, '-c', {child!r}]); "
        "open(sys.argv[1], 'w').write(json.dumps({'problems': ['odd'], 'child': child.pid})); time.sleep(60)"
    )
    started = time.monotonic()
    slow, after = run(on_gpu, tmp_path, make_step(on_gpu, "slow", code, limit_s=2), make_step(on_gpu, "after", "pass"))
    assert time.monotonic() - started < 20
    assert (slow.status, slow.reason, after.status) == ("failed", "stopped after 2 s; odd", "passed")
    assert ends(slow.result["child"])


def test_nothing_that_a_step_leaves_behind_goes_on(on_gpu: ModuleType, tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, json; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "open(sys.argv[1], 'w').write(json.dumps({'problems': [], 'child': child.pid}))"
    )
    (outcome,) = run(on_gpu, tmp_path, make_step(on_gpu, "leaves", code))
    assert outcome.status == "passed"
    assert ends(outcome.result["child"])


def test_what_cannot_run_says_why(on_gpu: ModuleType, tmp_path: Path) -> None:
    outcomes = run(
        on_gpu,
        tmp_path,
        make_step(on_gpu, "one", "pass", needs=("json", "no_such_module")),
        make_step(on_gpu, "two", "pass", needs=("no_such_module", "nor.this")),
        make_step(on_gpu, "last", "import time; time.sleep(30)", limit_s=2),
        make_step(on_gpu, "late", "pass"),
        limit_s=2.5,
    )
    assert [x.status for x in outcomes] == ["skipped", "skipped", "failed", "skipped"]
    assert outcomes[0].reason == "no_such_module is missing"
    assert outcomes[1].reason == "no_such_module and nor.this are missing"
    assert outcomes[3].reason == "the 2 seconds for all are over"
    assert on_gpu.last_line(outcomes) == "FAILED: last; skipped: one, two, late; 0 of 4 steps passed"


def test_steps_are_chosen_by_number_and_name(on_gpu: ModuleType) -> None:
    assert [step.name for step in on_gpu.choose("3, tests")] == ["tests", "verify"]
    assert len(on_gpu.choose(None)) == 7
    assert sum(step.limit_s for step in on_gpu.STEPS) <= on_gpu.LIMIT_S
    with pytest.raises(ValueError, match="'9' is no step"):
        on_gpu.choose("1,9")


def test_wheels_bring_only_what_is_missing(on_gpu: ModuleType, tmp_path: Path) -> None:
    for name in ("layerskip_no_such_package", "pytest"):
        with zipfile.ZipFile(tmp_path / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "")
            folder = f"{name}-1.0.dist-info"
            wheel.writestr(f"{folder}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            wheel.writestr(f"{folder}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{folder}/RECORD", "")
    assert on_gpu.install_wheels(tmp_path, tmp_path / "site") is None
    assert [path.name for path in (tmp_path / "site").glob("*.py")] == ["layerskip_no_such_package.py"]
    (tmp_path / "layerskip_broken-1.0-py3-none-any.whl").write_text("no wheel")
    assert "layerskip_broken" in on_gpu.install_wheels(tmp_path, tmp_path / "again")
    assert on_gpu.install_wheels(tmp_path / "nowhere", tmp_path / "site") == f"{tmp_path / 'nowhere'} is no folder"


def test_a_machine_without_what_is_asked_for(tmp_path: Path) -> None:
    """The real script: the exit code is 1, and the last line says what failed."""
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OUT": str(tmp_path)}
    command = [sys.executable, str(SCRIPT), "--steps", "parity"]
    done = subprocess.run(command, env=hidden, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "FAILED: parity; 0 of 1 steps passed"
    assert "there is no CUDA device that torch" in done.stdout
    assert json.loads((tmp_path / "record.jsonl").read_text())["reason"].startswith("there is no CUDA device")


def test_a_step_of_the_real_script_on_the_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--steps", "environment", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "1 of 1 steps passed"), done.stdout
    result = json.loads((tmp_path / "record.jsonl").read_text())["result"]
    assert result["versions"]["layerskip"]
    assert result["packages"]["torch"]
    assert result["native"]
