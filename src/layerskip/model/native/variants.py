"""The compiled libraries that the package has, one for each instruction set: which fit, and which one is used.

All of them have the same functions and keep weights in the same layout. A process uses one of them: the best that
processor and operating system allow, or one that is named by the environment or by the first model that is loaded.
"""

import ctypes
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerskip.errors import InvalidArgumentError

TARGETS = ("amx", "avx512bf16", "avx512vnni", "avx512", "avx2", "i8mm", "dotprod", "neon", "generic")
"""Instruction sets that libraries may be for, the fastest of each kind of processor first."""
TARGET_VARIABLE = "LAYERSKIP_CPU"
"""Environment variable that insists on an instruction set."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a library must be like for this version of the package to call it."""

    interface: int
    """Version of what the functions do."""
    functions: Mapping[str, tuple[Any, list[Any]]]
    """Result and parameters of each function, by its name without `layerskip_`."""
    layout: Callable[[], str]
    """Structures and their fields, as `layerskip_layout` describes them."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A library's file, and whether it can be used here."""

    path: Path
    target: str
    """The instruction set that it was compiled for; by the file's name if it doesn't say."""
    library: ctypes.CDLL | None = None
    """The loaded library with its functions declared; None if it can't be used."""
    problem: str | None = None
    """Why it can't be used, in words that follow its name."""
    outdated: bool = False
    """Whether the file was built of other sources than this version's: that needs the user's attention."""


def open_variant(path: Path, expected: Expected) -> Variant:
    """Load a library if it exists, belongs to this version, and can run on this processor.

    What is called before the processor is known to suit was compiled without the instruction set.
    """
    named = path.stem.removeprefix("_native_")
    if not path.exists():
        return Variant(path=path, target=named, problem="isn't in this installation")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return Variant(path=path, target=named, problem=f"can't be loaded: {error}", outdated=True)
    try:
        for name, (result, parameters) in expected.functions.items():
            function = getattr(library, f"layerskip_{name}")
            function.restype, function.argtypes = result, parameters
    except AttributeError:
        problem = f"was built for another version: it has no layerskip_{name}"
        return Variant(path=path, target=named, problem=problem, outdated=True)
    target = library.layerskip_target().decode()
    if not library.layerskip_runs_here():
        missing = ", ".join(library.layerskip_missing().decode().split())
        return Variant(path=path, target=target, problem=f"needs {missing}, which this processor or system lacks")
    interface = library.layerskip_interface()
    if interface != expected.interface:
        problem = f"was built for another version: interface {interface}, and not {expected.interface}"
    elif library.layerskip_layout().decode() != expected.layout():
        problem = "was built for another version: its structures are laid out differently"
    else:
        return Variant(path=path, target=target, library=library)
    return Variant(path=path, target=target, problem=problem, outdated=True)


def pick(variants: Sequence[Variant], wanted: str | None, asked_by: str) -> Variant | None:
    """The first that can be used, or None if none can.

    Args:
        variants: The best first.
        wanted: Instruction set to insist on.
        asked_by: What named it, for an error.

    Raises:
        InvalidArgumentError: The wanted one can't be used here; the message names those that can.
    """
    usable = {variant.target: variant for variant in reversed(variants) if variant.library is not None}
    if wanted is None:
        return next((variant for variant in variants if variant.library is not None), None)
    if wanted not in usable:
        names = ", ".join(variant.target for variant in variants if variant.library is not None) or "none"
        reason = next((variant.problem for variant in variants if variant.target == wanted), "isn't known")
        raise InvalidArgumentError(
            f"the kernels for {wanted!r} ({asked_by}) can't be used: that library {reason}; those that can run here: "
            f"{names}"
        )
    return usable[wanted]


def outdated_text(variants: Sequence[Variant]) -> str | None:
    """A warning about libraries of other versions, None if there are none."""
    files = [f"{variant.path.name} {variant.problem}" for variant in variants if variant.outdated]
    if not files:
        return None
    return f"{'; '.join(files)}; install layerskip again to build what belongs to it, until then it may run slower"


class Choice:
    """Which instruction set this process uses: the first model that runs in compiled code settles it."""

    def __init__(self) -> None:
        self.forced: str | None = None
        """The one that a model was loaded with by name."""
        self.settled: str | None = None
        """The one that a network runs with."""

    def wanted(self) -> tuple[str | None, str]:
        """The instruction set to insist on, if any, and what named it."""
        if self.forced is not None:
            return self.forced, f"kernels 'native:{self.forced}'"
        return os.environ.get(TARGET_VARIABLE) or None, TARGET_VARIABLE

    def check(self, target: str) -> None:
        """Raise `InvalidArgumentError` if the process has to use another instruction set than this one."""
        named = os.environ.get(TARGET_VARIABLE)
        if named and named != target:
            raise InvalidArgumentError(
                f"kernels 'native:{target}' and {TARGET_VARIABLE}={named} contradict each other; drop one of them"
            )
        if self.settled is not None and self.settled != target:
            raise InvalidArgumentError(
                f"kernels 'native:{target}' can't be used in this process, which runs those for {self.settled!r}: a "
                f"process uses one library; load the model in another process, or start with {TARGET_VARIABLE}={target}"
            )


@functools.cache
def process_choice() -> Choice:
    """The choice of this process."""
    return Choice()
