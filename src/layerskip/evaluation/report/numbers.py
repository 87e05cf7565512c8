"""Numbers and names as text for reports; a missing number is a dash."""

import json
import math
from collections.abc import Mapping
from typing import Any

NONE = "–"
"""Text for a missing number."""
STRATEGIES = {
    "early_exit": "early exit",
    "self_speculative": "self-speculative",
    "ngram": "n-gram",
    "transformers_early_exit": "transformers, early exit",
}
OPTIONS = {"exit_layer": "exit", "num_speculations": "drafts"}


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def significant(value: Any, digits: int = 3) -> str:
    """A number with at least this many digits, whole numbers with commas: 0.0123, 4.56, 78.9, 1,234."""
    found = number(value)
    if found is None:
        return NONE
    if found == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(found)))
    found = round(found, places) if places > 0 else found  # 9.999 is 10.0, not 10.00
    places = digits - 1 - math.floor(math.log10(abs(found))) if found else 0
    return f"{found:,.{max(0, places)}f}" if places <= 8 else f"{found:.{digits - 1}e}"


def tick(value: float) -> str:
    """A round number of an axis: 0.2, 25, 1,200."""
    return f"{value:,.6g}"


def percent_tick(value: float) -> str:
    """A round share of an axis: 20%."""
    return f"{100 * value:.6g}%"


def count(value: Any) -> str:
    """A whole number, with commas."""
    found = number(value)
    return NONE if found is None else f"{found:,.0f}"


def ratio(value: Any) -> str:
    """A ratio: 2.31×."""
    found = number(value)
    return NONE if found is None else f"{found:.2f}×"


def interval(low: Any, high: Any, unit: str = "") -> str:
    """An interval: 2.20–2.43."""
    ends = number(low), number(high)
    return NONE if None in ends else f"{ends[0]:.2f}{NONE}{ends[1]:.2f}{unit}"


def percent(value: Any) -> str:
    """A share: 71.2%."""
    found = number(value)
    return NONE if found is None else f"{100 * found:.1f}%"


def seconds(value: Any) -> str:
    """A time in the unit that fits it: 850 µs, 12.3 ms, 4.56 s, 1 h 02 min."""
    found = number(value)
    if found is None:
        return NONE
    if found >= 3600:
        return f"{int(found // 3600)} h {int(found % 3600 // 60):02d} min"
    if found >= 60:
        return f"{int(found // 60)} min {int(found % 60):02d} s"
    scale, unit = (1, "s") if found >= 1 else (1e3, "ms") if found >= 1e-3 else (1e6, "µs")
    return f"{significant(found * scale)} {unit}"


def memory(value: Any) -> str:
    """Bytes: 1.25 GiB."""
    found = number(value)
    if found is None:
        return NONE
    scale, unit = next(((2.0**p, u) for p, u in ((30, "GiB"), (20, "MiB"), (10, "KiB")) if found >= 2**p), (1.0, "B"))
    return f"{significant(found / scale)} {unit}"


def strategy_name(name: Any) -> str:
    """A strategy's name in running text."""
    return NONE if name is None else STRATEGIES.get(str(name), str(name))


def options(values: Any) -> str:
    """Options of a strategy: exit 4, drafts 6."""
    if not isinstance(values, Mapping):
        return ""
    known = {str(name): value for name, value in values.items() if value is not None}
    known.pop("generation_strategy", None)  # the strategy's name says it
    named = {OPTIONS.get(name, name): value for name, value in known.items()}
    return ", ".join(f"{name} {plain(value)}" for name, value in named.items())


def plain(value: Any) -> str:
    """A value of a configuration as text."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple) and all(isinstance(item, str | int | float) for item in value):
        return ", ".join(map(plain, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one mapping, with dots in the names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def shorten(text: str, length: int) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length and len(text) <= 4 * length else line[: length - 1] + "…"
