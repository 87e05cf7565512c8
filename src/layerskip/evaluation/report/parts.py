"""Sections at the end of every report: configuration, machine, command."""

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from layerskip.decoding.config import GenerationConfig
from layerskip.evaluation.report.numbers import flatten, plain, shorten
from layerskip.evaluation.report.page import Html, pairs, section, tag, titled

DEFAULTS: Mapping[str, Any] = json.loads(json.dumps(asdict(GenerationConfig())))
"""Defaults of a benchmark's options as JSON values, which needn't be shown."""


def objects(values: Any) -> list[dict[str, Any]]:
    """The objects in a list; empty if there is no list."""
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def mapping(value: Any) -> dict[str, Any]:
    """An object, or an empty one if it is missing."""
    return value if isinstance(value, dict) else {}


def numbers(values: Iterable[float | None]) -> list[float]:
    """The values that are numbers."""
    return [value for value in values if value is not None]


def subject(configuration: Mapping[str, Any]) -> str:
    """Model and data set, for the line above the headline."""
    flat = {name.rpartition(".")[2]: value for name, value in reversed(flatten(configuration).items())}
    named = (flat.get(name) for name in ("model", "dataset", "tasks"))
    return " · ".join(shorten(plain(value), 80) for value in named if value not in (None, "", []))


def reproduction(content: Mapping[str, Any]) -> str:
    """The command that repeats this run: the configuration as flags, without default values."""
    kind = str(content.get("kind"))
    defaults = DEFAULTS if kind == "benchmark" else {}
    words = ["layerskip", kind]
    for path, value in settings(content).items():
        name = path.rpartition(".")[2]
        if name == "url":  # of bench-serve; it has no flag
            words.append(str(value))
        elif value is not None and value != defaults.get(name, "auto"):
            words += _flag(name, value, has_opposite=name in defaults)
    return shlex.join(words)


def _flag(name: str, value: Any, *, has_opposite: bool) -> list[str]:
    """The words of a command that set an option."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}"] if value else [f"--no-{flag}"] if has_opposite else []
    if name == "stop" and isinstance(value, list):
        return [word for text in value for word in (f"--{flag}", str(text))]
    if name == "eos_token_ids" and isinstance(value, list):
        return [f"--{flag}", *map(str, value)]
    if isinstance(value, list):
        return [f"--{flag}", ",".join(map(str, value))] if value else []
    return [f"--{flag}", str(value)] if isinstance(value, str | int | float) else []


def settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with dots for nested objects; a grid is given by its ends and steps."""
    flat = flatten(mapping(content.get("configuration")))
    grid = flat.get("grid")
    if not isinstance(grid, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in grid):
        return flat
    del flat["grid"]
    for name, place in (("exit_layer", 0), ("num_speculations", 1)):
        values = sorted({whole for pair in grid if isinstance(whole := pair[place], int)})
        if values:
            step = values[1] - values[0] if len(values) > 1 else 1
            flat |= {f"{name}_first": values[0], f"{name}_last": values[-1], f"{name}_step": step}
    return flat


def left_out(content: Mapping[str, Any]) -> list[Html]:
    """A section on prompts that were left out, if there are any."""
    others = mapping(content.get("results")).get("left_out")
    rows = [(str(each.get("index")), str(each.get("reason"))) for each in others or [] if isinstance(each, dict)]
    return [section("Left out", f"{len(rows)} prompts leave no room for an answer.", pairs(rows))] if rows else []


def origin(content: Mapping[str, Any]) -> list[Html]:
    """Sections on configuration, machine and command."""
    configuration = settings(content)
    machine = flatten(mapping(content.get("machine")))
    shown = [(name, plain(value)) for name, value in configuration.items()]
    versions = [(name.removeprefix("versions."), plain(value)) for name, value in machine.items()]
    return [
        *left_out(content),
        section(
            "Configuration",
            "All that the results depend on.",
            pairs(shown) if shown else tag("p", "Nothing but the defaults."),
            titled("Command", tag("pre", "\n", reproduction(content))),
        ),
        section("Machine", "What the figures were measured on.", pairs(versions) if versions else None),
    ]
