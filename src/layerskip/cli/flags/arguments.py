"""Command-line arguments: frozen dataclasses, turned into flags by tyro, and the groups that commands share.

A command's arguments are a frozen keyword-only dataclass. Its docstring is the help's first paragraph and ends with an
example; the docstring below a field is that flag's help. Groups are fields of their own and add their flags without a
prefix:

    @dataclass(frozen=True, kw_only=True)
    class VerifyArguments:
        model: ModelArguments = field(default_factory=ModelArguments)
        decoding: DecodingArguments = field(default_factory=DecodingArguments)
        output: OutputArguments = field(default_factory=OutputArguments)

Nothing here imports torch: help must come at once.
"""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields
from inspect import cleandoc
from io import StringIO
from pathlib import Path
from shutil import get_terminal_size
from textwrap import fill
from typing import Annotated, Any, TextIO, TypeVar

import tyro
from tyro.conf import DisallowNone, FlagCreatePairsOff, OmitArgPrefixes, Suppress, UseAppendAction, arg

from layerskip.checkpoint.loading.config import LoadingConfig
from layerskip.cli.ranks.session import joined
from layerskip.decoding.config import GenerationConfig
from layerskip.errors import InvalidArgumentError

Arguments = TypeVar("Arguments")
Switch = FlagCreatePairsOff[bool]
"""A flag without its opposite."""
Text = Annotated[str | None, arg(metavar="TEXT")]
File = Annotated[Path | None, arg(metavar="FILE")]


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """Which model."""

    model: Annotated[str, arg(metavar="MODEL")] = "demo"
    """demo (the embedded model), smollm2, gemma3-270m, a folder, a GGUF file, or a hub id (owner/name)."""
    revision: Annotated[str | None, arg(metavar="NAME")] = None
    """Branch, tag or commit of a hub repository."""


@dataclass(frozen=True, kw_only=True)
class ModelArguments(LoadingConfig, NamedModel):
    """Which model, and how to load it."""

    device: Annotated[str, arg(metavar="DEVICE")] = "auto"
    tensor_parallel: Annotated[int, arg(metavar="N")] = 1
    """Processes that share the network, each with a part of every layer; torchrun's if that has started them."""
    device_memory: Annotated[str | None, arg(metavar="SIZE")] = None
    draft_vocabulary: Annotated[int | None, arg(metavar="N")] = None
    draft_text: Annotated[Path | None, arg(metavar="FILE")] = None
    exit_adapters: Annotated[str | Path | None, arg(metavar="DIR")] = "auto"
    """A folder with exit adapters, trained for this very model; auto: those that lie with the model."""
    no_exit_adapters: Switch = False
    """Draft at bare exits, as if there were no adapters."""

    def __post_init__(self) -> None:
        """Check the options; without adapters the option that names them means nothing."""
        super().__post_init__()
        session = joined()
        if session is not None and self.tensor_parallel == 1:
            object.__setattr__(self, "tensor_parallel", session.place.num_ranks)
        if self.no_exit_adapters:
            if self.exit_adapters not in ("auto", None):
                raise InvalidArgumentError("give --exit-adapters or --no-exit-adapters, not both")
            object.__setattr__(self, "exit_adapters", None)


@dataclass(frozen=True, kw_only=True)
class OutputArguments:
    """What is printed."""

    json: Switch = False
    """Print JSON, and nothing else, on standard output."""
    verbose: Switch = False
    """Also tell, on standard error, what is harmless: keys of config.json that other programs wrote."""
    no_color: Switch = False
    """No colours; without it, they appear on a terminal, unless NO_COLOR is set."""


@dataclass(frozen=True, kw_only=True)
class DecodingArguments(GenerationConfig):
    """How to decode; the same names as in Python."""

    do_sample: Annotated[bool | None, arg(aliases=["--sample"])] = None
    """Sample, or take the most likely token. If not given: sample when temperature, top-k, top-p or min-p is set."""
    stop: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="TEXT")] = ()
    """A text that ends the generation; it isn't part of the result."""
    logit_bias: Suppress[tuple[tuple[int, float], ...]] = ()
    logprobs: Suppress[int | None] = None


def parse(kind: type[Arguments], command: str, argv: Sequence[str], *, default: Arguments | None = None) -> Arguments:
    """Arguments of a command; prints the help and leaves (`SystemExit`) where it is asked for.

    Args:
        kind: The command's dataclass.
        command: The command's name.
        argv: What follows it.
        default: Values of flags that aren't given; those of the dataclass if there is none.

    Raises:
        InvalidArgumentError: The command line is wrong; the message fits into one line.
    """
    shown, report = _Copy(sys.stdout), _Copy(sys.stderr)
    paragraphs = cleandoc(kind.__doc__ or "").split("\n\n")
    description = "\n\n".join(text if "\n " in text else text.replace("\n", " ") for text in paragraphs)
    wants_help = not {"-h", "--help"}.isdisjoint(argv)
    try:
        with redirect_stdout(shown), redirect_stderr(report), _columns(None if wants_help else 10_000):
            return tyro.cli(
                kind,
                prog=f"layerskip {command}",
                description=description,
                args=in_our_terms(argv) if _decodes(kind) else list(argv),
                default=tyro.MISSING_NONPROP if default is None else default,
                config=(DisallowNone, OmitArgPrefixes),
            )
    except SystemExit as stop:
        if not stop.code:
            print(_wrap(shown.getvalue()), end="")
            raise
        hint = f"; see layerskip {command} --help"
        raise InvalidArgumentError(condense(report.getvalue()) + hint) from None


def parse_numbers(name: str, text: str) -> list[int]:
    """Positive whole numbers from a list such as '1,4', each once.

    Raises:
        InvalidArgumentError: It is no such list; names the flag.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise InvalidArgumentError(f"{name} must be positive whole numbers separated by commas, got {text!r}")
    return list(dict.fromkeys(numbers))


META_FLAGS = {"--max-steps": "--max-new-tokens"}
"""Flags of Meta's scripts that have another name here."""
META_DEFAULTS = {"--exit-layer", "--num-speculations"}
"""Flags to which Meta's scripts give -1 where they mean none."""
SAMPLE_FLAGS = {"--sample", "--do-sample"}


def in_our_terms(argv: Sequence[str]) -> list[str]:
    """A command line as Meta's scripts take it (`--sample False --max_steps 64 --exit_layer -1`), in our terms."""
    translated: list[str] = []
    rest = [part for given in argv for part in _halves(given)]
    while rest:
        flag = rest.pop(0)
        name = flag.replace("_", "-") if flag.startswith("--") else flag
        if name in META_DEFAULTS and rest[:1] == ["-1"]:
            rest.pop(0)
        elif name in SAMPLE_FLAGS and rest[:1] in (["True"], ["False"], ["true"], ["false"]):
            translated.append("--sample" if rest.pop(0).lower() == "true" else "--no-sample")
        else:
            translated.append(META_FLAGS.get(name, flag))
    return translated


def _halves(argument: str) -> list[str]:
    """`--flag=value` of a flag that Meta's scripts use otherwise as flag and value; anything else as it is."""
    flag, equals, value = argument.partition("=")
    known = flag.replace("_", "-") in {*META_FLAGS, *META_DEFAULTS, *SAMPLE_FLAGS}
    return [flag, value] if equals and flag.startswith("--") and known else [argument]


def _decodes(kind: type[Any]) -> bool:
    """Whether a command's arguments have options of decoding."""
    return any(field.type in (DecodingArguments, "DecodingArguments") for field in fields(kind))


class _Copy(StringIO):
    """Keeps what is printed, and passes for the stream that it stands for."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def isatty(self) -> bool:
        return self._stream.isatty() and not os.environ.get("NO_COLOR")


def _wrap(text: str) -> str:
    """Break the description's lines, which tyro leaves as long as they are, between words."""
    width = get_terminal_size().columns
    lines = (
        line if line[:1] in " │╭╰\x1b" else fill(line, width, break_on_hyphens=False) for line in text.splitlines()
    )
    return "\n".join(lines) + "\n"


def condense(report: str) -> str:
    """The message in one of tyro's framed error reports."""
    lines = [line.strip("│| \t") for line in report.splitlines()]
    if any(line.startswith("Missing from ") for line in lines):
        missing = [line for line in lines if line.startswith("--")]
        return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    rules = [place for place, line in enumerate(lines) if re.match("[╭╰─+-]{2}", line)] + [len(lines)]
    message = " ".join(lines[rules[0] + 1 : rules[1]]) if len(rules) > 2 else " ".join(lines)
    message = re.sub(r"^Error parsing (?!--)\S+: ", "", message)
    message = re.sub(r"^Error parsing (--\S+): ", r"\1: ", message)
    message = re.sub(
        r"no type matching (.+?) could be instantiated from \['(.*)'\]\. .*", r"expected \1, got '\2'", message
    )
    message = re.sub(r"\. Expected 1 values\.$", "", message)
    guess = re.search(r"Perhaps you meant:\s+(--[\w-]+)", "\n".join(lines))
    if guess:
        message += f" (did you mean {guess[1]}?)"
    return message[:1].lower() + message[1:]


@contextmanager
def _columns(number: int | None) -> Iterator[None]:
    """Make tyro believe in a terminal of this width, so that it breaks no line of an error's message."""
    before = os.environ.get("COLUMNS")
    if number is not None:
        os.environ["COLUMNS"] = str(number)
    try:
        yield
    finally:
        if number is not None:
            os.environ.pop("COLUMNS")
            if before is not None:
                os.environ["COLUMNS"] = before
