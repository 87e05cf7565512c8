"""What is wrong with a body whose fields don't have the types that are declared."""

from collections.abc import Mapping, Sequence
from typing import Any

from layerskip.serving.protocol.errors import ApiError

MOST_SHOWN = 80


def explain(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """An error that names the first field that is wrong.

    Args:
        errors: As pydantic has them: `loc`, `type`, `msg` and `input`.
    """
    error = _deepest(errors)
    param = _field(error["loc"])
    code = "invalid_value"
    match error["type"]:
        case "missing":
            message, code = f"{param or 'the body'} is missing", "missing_required_parameter"
        case "extra_forbidden":
            message, code = (
                f"{param} is not known: neither OpenAI nor this server has such a field",
                "unknown_parameter",
            )
        case _:
            given = "" if error["type"] == "json_invalid" else f", got {_shown(error.get('input'))}"
            message = f"{param or 'the body'}: {_lower(str(error['msg']))}{given}"
    return ApiError(400, message, param=param, code=code)


def _deepest(errors: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Of the ways in which the first wrong field fails to be one of several types, the one that got furthest."""
    name = errors[0]["loc"][:2]
    first = [error for error in errors if error["loc"][:2] == name]
    return max(first, key=_progress)


def _progress(error: Mapping[str, Any]) -> tuple[list[int], bool]:
    places = [part for part in error["loc"] if isinstance(part, int)]
    return places, error["type"] not in ("list_type", "string_type")


def _field(location: Sequence[str | int]) -> str | None:
    """A field's path as OpenAI writes it: messages[0].content; without the types that pydantic puts in between."""
    path = ""
    for place, part in enumerate(location[1:]):
        if isinstance(part, int):
            path += f"[{part}]"
        elif place == 0:
            path = part
        elif "[" not in part and part not in _TYPES and not part[:1].isupper():
            path += f".{part}"
    return path or None


_TYPES = (
    "str",
    "int",
    "float",
    "bool",
    "TextPart",
    "NamedTool",
    "AllowedTools",
    "StreamOptions",
    "ResponseFormat",
    "constrained-int",
)
"""Names in pydantic's locations that aren't fields."""


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
