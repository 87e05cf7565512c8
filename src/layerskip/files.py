"""Atomic writing, JSON, and the cache folder."""

import json
import math
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content in one step, so that no reader sees a part of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: The text isn't JSON, or is nested too deep for Python.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def to_json(content: Any, *, indent: int | None = None) -> str:
    """JSON that every program can read: infinite numbers and NaN, which JSON doesn't have, become null."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, float) and not math.isfinite(content):
        return None
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    return [_finite(item) for item in content] if isinstance(content, list | tuple) else content


def cache_folder() -> Path:
    """`LAYERSKIP_CACHE`, or a folder in the user's cache, for files that may be deleted; it may not exist yet."""
    named = os.environ.get("LAYERSKIP_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layerskip"
