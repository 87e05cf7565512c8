"""Settings of a run as a TOML file: read with an error that names each mistake, and written back."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from layerskip.errors import InvalidArgumentError

Settings = TypeVar("Settings")


def read_settings(path: Path, kind: type[Settings]) -> Settings:
    """Read settings from a TOML file whose tables are the fields of a dataclass of dataclasses.

    Args:
        path: The file.
        kind: The dataclass; a setting that the file leaves out keeps its default.

    Raises:
        InvalidArgumentError: The file can't be read, or has an unknown name or a value of the wrong type.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgumentError(f"{path} can't be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"{path} is not TOML: {error}") from error
    settings: Settings = _build(kind, tables, str(path))
    return settings


def write_settings(settings: Any) -> str:
    """Settings as TOML, defaults included; settings that are None are left out."""
    tables = []
    for table, values in asdict(settings).items():
        lines = [f"{name} = {_toml(value)}" for name, value in values.items() if value is not None]
        tables.append("\n".join([f"[{table}]", *lines]))
    return "\n\n".join(tables) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str) and not value.isprintable() and any("\ud800" <= c <= "\udfff" for c in value):
        raise InvalidArgumentError(f"{value!r} is not text in UTF-8; rename the file or folder")
    # TOML's strings, booleans and numbers are JSON's, once characters beyond ASCII are left alone.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _build(kind: type[Any], values: Mapping[str, Any], where: str) -> Any:
    hints = get_type_hints(kind)
    known = [field.name for field in fields(kind)]
    for name in values:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            guess = f"did you mean {close[0]!r}?" if close else f"it knows {', '.join(known)}"
            raise InvalidArgumentError(f"{where}: unknown name {name!r}; {guess}")
    return kind(**{name: _convert(hints[name], value, f"{where}: {name}") for name, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if is_dataclass(hint):
        if not isinstance(value, dict):
            raise InvalidArgumentError(f"{where} must be a table, got {value!r}")
        assert isinstance(hint, type)
        return _build(hint, value, where)
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (option for option in get_args(hint) if option is not NoneType)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise InvalidArgumentError(f"{where} must be one of {', '.join(get_args(hint))}, got {value!r}")
    elif get_origin(hint) is tuple:
        part_hint = get_args(hint)[0]
        if not isinstance(value, list) or not all(type(part) is part_hint for part in value):
            kind = {int: "whole numbers", str: "texts"}[part_hint]
            raise InvalidArgumentError(f"{where} must be a list of {kind}, got {value!r}")
        return tuple(value)
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        name = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[hint]
        raise InvalidArgumentError(f"{where} must be {name}, got {value!r}")
    return value
