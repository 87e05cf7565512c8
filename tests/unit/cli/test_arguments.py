"""Flags become frozen dataclasses, and every wrong command line one line of error."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from layerskip.cli.flags.arguments import (
    DecodingArguments,
    File,
    ModelArguments,
    OutputArguments,
    Switch,
    Text,
    condense,
    parse,
)
from layerskip.errors import InvalidArgumentError


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A command of this test."""

    text: Text = None
    """A text."""
    file: File = None
    """A file."""
    switch: Switch = False
    """A switch."""
    model: ModelArguments = field(default_factory=ModelArguments)
    decoding: DecodingArguments = field(default_factory=DecodingArguments)
    output: OutputArguments = field(default_factory=OutputArguments)


def decoding(*argv: str) -> DecodingArguments:
    return parse(Sample, "sample", argv).decoding


def test_no_flags_are_the_defaults() -> None:
    assert parse(Sample, "sample", []) == Sample()


@pytest.mark.parametrize(
    ("dashes", "value"),
    [
        ("--exit-layer", "3"),
        ("--num-speculations", "7"),
        ("--generation-strategy", "autoregressive"),
        ("--max-new-tokens", "9"),
        ("--top-p", "0.5"),
        ("--eos-token-ids", "5"),
    ],
)
def test_underscores_are_dashes(dashes: str, value: str) -> None:
    underscores = "--" + dashes[2:].replace("-", "_")
    assert decoding(underscores, value) == decoding(dashes, value) == decoding(f"{underscores}={value}")
    assert decoding(dashes, value) != decoding()


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--sample", True),
        ("--no-sample", False),
        ("--do-sample", True),
        ("--do_sample", True),
        ("--no-do-sample", False),
        ("--no_sample", False),
    ],
)
def test_sample(flag: str, expected: bool) -> None:
    assert decoding(flag).do_sample is expected
    assert decoding().do_sample is None


def test_stop_can_be_repeated_and_is_not_changed() -> None:
    assert decoding("--stop", "a_b", "--stop=--c_d").stop == ("a_b", "--c_d")


def test_texts_are_taken_as_they_are() -> None:
    assert parse(Sample, "sample", ["--text", "None"]).text == "None"
    assert parse(Sample, "sample", ["--text=--a_b [red]"]).text == "--a_b [red]"
    assert parse(Sample, "sample", ["--text", "- a list"]).text == "- a list"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--exit-layer", "x"], "--exit-layer: expected INT, got 'x'"),
        (["--exit-layer", "None"], "--exit-layer: expected INT, got 'None'"),
        (["--exit-layer", "0"], "exit_layer must be a whole number of at least 1, got 0"),
        (["--temperature", "-1"], "temperature must be 0 or more, got -1.0"),
        (["--temperature", "nan"], "temperature must be 0 or more, got nan"),
        (["--temperature", "warm"], "--temperature: expected FLOAT, got 'warm'"),
        (["--text"], "missing value for argument '--text'"),
        (["stray"], "unrecognized options: stray"),
        (["--exit_laier", "3"], "unrecognized options: --exit_laier, 3 (did you mean --exit-layer?)"),
        (["--acceptance", "maybe"], "invalid choice 'maybe' for argument '--acceptance'. Expected one of"),
        (["--no-switch"], "unrecognized options: --no-switch"),
        (["--stop="], "stop must be texts that aren't empty, got ('',)"),
    ],
)
def test_errors_are_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        parse(Sample, "sample", argv)
    assert message in str(caught.value)
    assert str(caught.value).endswith("; see layerskip sample --help")
    assert "\n" not in str(caught.value)


def test_narrow_terminals_do_not_break_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    with pytest.raises(InvalidArgumentError, match="--" + "x" * 60):
        parse(Sample, "sample", ["--" + "x" * 60])


def test_condense_keeps_what_it_does_not_know() -> None:
    assert condense("Something else\nhappened") == "something else happened"


@pytest.mark.parametrize(
    "argv",
    [
        ["nonsense"],
        ["--nonsense"],
        ["generate", "--nonsense"],
        ["generate", "--prompt", ""],
        ["generate"],
        ["generate", "--prompt", "a", "--prompt-file", "b"],
        ["generate", "--prompt-file", "/nowhere/at all"],
        ["generate", "--prompt", "a", "--model", "/nowhere"],
        ["generate", "--prompt", "a", "--dtype", "int4"],
        ["generate", "--prompt", "a", "--device", "toaster"],
        ["generate", "--prompt", "a", "--exit-layer", "17"],
        ["generate", "--prompt", "a", "--temperature", "nan"],
        ["generate", "--prompt", "a", "--max-context", "0"],
        ["generate", "--prompt", "a b c d e f g h", "--max-context", "4"],
        ["chat", "--model", "demo"],
        ["chat", "--chat-template", "/nowhere.jinja"],
        ["demo", "--model", "demo", "--exit-layer", "17"],
        ["demo", "--num-speculations", "0"],
    ],
)
def test_every_failure_is_one_line_and_exit_code_2(argv: list[str], cli: Callable) -> None:
    outcome = cli(*argv)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("layerskip: error: ")
    assert outcome.err.count("\n") == 1
    assert "Traceback" not in outcome.err
