"""`layerskip export transformers` writes a folder and says how to use it."""

import json
from pathlib import Path

import pytest

from layerskip.cli.export.transformers import run
from layerskip.errors import InvalidArgumentError


def test_it_writes_code_and_prints_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--output", str(tmp_path / "out"), "--exit-layer", "3"]) == 0
    first, _, snippet = capsys.readouterr().out.partition("\n")
    assert first == f"{tmp_path / 'out'}: code for transformers"
    compile(snippet, "snippet", "exec")
    assert f"custom_generate={str(tmp_path / 'out')!r}" in snippet
    assert "exit_layer=3" in snippet
    assert (tmp_path / "out" / "custom_generate" / "generate.py").is_file()


def test_json_has_the_models_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--output", str(tmp_path / "out"), "--model", "demo", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["exit_layer"], report["num_speculations"], report["has_model"]) == (4, 4, True)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    for argv in ([], ["--output", str(tmp_path)], ["--output", str(tmp_path / "x"), "--exit-layer", "0"]):
        (tmp_path / "file").touch()
        with pytest.raises(InvalidArgumentError) as error:
            run(argv)
        assert "\n" not in str(error.value)


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(["--help"])
    assert not stop.value.code
    assert "Example: layerskip export transformers " in " ".join(capsys.readouterr().out.split())
