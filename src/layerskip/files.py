"""Files that are whole or not there, and where those go that may be deleted at any time."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content as a whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def cache_folder() -> Path:
    """`LAYERSKIP_CACHE`, or a folder of the user's cache; it may not exist yet."""
    named = os.environ.get("LAYERSKIP_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layerskip"
