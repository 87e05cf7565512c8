"""`layerskip report`: where the page goes, what is printed, what is refused."""

import json
from pathlib import Path

import pytest

from layerskip.cli.measuring.report import run
from layerskip.errors import InvalidArgumentError
from layerskip.evaluation.run_folder import RunFolder


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    paths = []
    for name in ("first", "second"):
        folder = RunFolder(tmp_path / name, "verify", {"model": "demo", "name": name})
        folder.add("0", {})
        folder.finish({"settings": [], "prompts": 1, "errors": 0})
        paths.append(str(tmp_path / name))
    return paths


def test_one_folder(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(folders[0], "report.html")
    assert run([folders[0]]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    assert "Nothing lost" in path.read_text(encoding="utf-8")
    path.unlink()
    assert run([folders[0], "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(path)}
    assert path.exists()


def test_several_folders(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run([*folders, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": "report.html"}
    assert "2 runs of layerskip verify" in Path("report.html").read_text(encoding="utf-8")
    assert run([*folders, "--output", "other.html"]) == 0
    assert capsys.readouterr().out == "other.html\n"
    assert Path("other.html").exists()


def test_what_is_refused(folders: list[str], tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="no folder was given"):
        run([])
    with pytest.raises(InvalidArgumentError, match="--output is for comparisons"):
        run([folders[0], "--output", "x.html"])
    with pytest.raises(InvalidArgumentError, match="no finished run"):
        run([str(tmp_path / "missing")])


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(["--help"])
    assert not stop.value.code
    shown = capsys.readouterr().out
    assert "DIR [DIR ...]" in shown
    assert "--output FILE" in shown
