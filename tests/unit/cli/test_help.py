"""What `--help` says is locked: after a change that is meant, run these tests once with UPDATE_SNAPSHOTS=1."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

from layerskip import __version__
from layerskip.cli.export import main as export
from layerskip.cli.flags.arguments import DecodingArguments
from layerskip.cli.main import COMMANDS, module_of
from layerskip.decoding.config import GenerationConfig

SNAPSHOTS = Path(__file__).parent / "snapshots"
TYRO_VERSION = "1.0.17"
"""Which tyro wrote the snapshots; others may lay the same help out differently, and then its flags are compared."""
HEAVY = {"torch", "transformers", "huggingface_hub", "numpy"}
ALL = [*COMMANDS, *(f"export {name}" for name in export.SUBCOMMANDS)]
"""Commands and subcommands."""


@pytest.mark.parametrize("command", ["", *ALL])
def test_help_is_as_recorded(command: str, cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    outcome = cli(*command.split(), "--help")
    assert (outcome.code, outcome.err) == (0, "")
    text = "\n".join(line.rstrip() for line in outcome.out.splitlines()) + "\n"
    file = SNAPSHOTS / f"{command.replace(' ', '-') or 'layerskip'}.txt"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        file.write_text(text, "utf-8")
    recorded = file.read_text("utf-8")
    if version("tyro") == TYRO_VERSION:
        assert text == recorded, "if the change is meant, run with UPDATE_SNAPSHOTS=1"
    else:
        assert flags(text) == flags(recorded)


def flags(text: str) -> list[str]:
    return sorted(set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text)))


@pytest.mark.parametrize("command", ALL)
def test_every_help_has_an_example(command: str, cli: Callable) -> None:
    assert f"layerskip {command} " in cli(*command.split(), "--help").out.partition("Example")[2]


def test_no_help_loads_torch() -> None:
    calls = [["--help"], ["--version"], *([*command.split(), "--help"] for command in ALL)]
    code = f"""
import sys
from layerskip.cli.main import main
for argv in {calls}:
    assert main(argv) == 0, argv
    assert not {HEAVY} & set(sys.modules), argv
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_wrong_flags_are_refused_without_torch() -> None:
    code = f"""
import sys
from layerskip.cli.main import main
assert main(["generate", "--prompt", "x", "--temperature", "nan"]) == 2
assert not {HEAVY} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr.count("\n")) == (0, 1), result.stderr


def test_overview_and_version(cli: Callable) -> None:
    assert cli().out == cli("--help").out == cli("help").out
    assert all(command in cli("--help").out for command in COMMANDS)
    assert cli("--version").out == f"layerskip {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_follow_the_convention(command: str) -> None:
    assert callable(import_module(module_of(command)).run)


@pytest.mark.parametrize("subcommand", export.SUBCOMMANDS)
def test_subcommands_follow_the_convention(subcommand: str) -> None:
    assert callable(import_module(export.module_of(subcommand)).run)


@pytest.mark.parametrize("wrong", ["drafts", "--model"])
def test_an_unknown_subcommand_is_named(wrong: str, cli: Callable) -> None:
    outcome = cli("export", wrong)
    assert outcome.code == 2
    assert repr(wrong) in outcome.err
    assert "draft" in outcome.err
    assert outcome.err.count("\n") == 1


def test_decoding_flags_are_the_fields_of_the_config() -> None:
    ours, theirs = (
        {field.name: field.default for field in fields(kind)} for kind in (DecodingArguments, GenerationConfig)
    )
    assert ours == theirs


def test_python_dash_m() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "layerskip", "--version"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, f"layerskip {__version__}\n")
