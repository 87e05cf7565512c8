"""What is asked of a text's form, and what may be asked: checked before any grammar is built."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from layerskip.checks import finite_number, whole_number
from layerskip.errors import GrammarError, brief

GrammarKind = Literal["json_object", "json_schema", "regex", "lark"]

_VALUES = frozenset({"enum", "const", "default", "examples", "example"})
"""Keywords whose values are no schemas."""


@dataclass(frozen=True, kw_only=True)
class GrammarLimits:
    """How large a grammar may be, and how long its compilation may take."""

    max_bytes: int = 65_536
    """Of a schema, a regular expression or a grammar as text, those of all its schemas together."""
    max_depth: int = 32
    """Objects and lists within each other in a schema."""
    max_keywords: int = 4_096
    """Keys of objects and items of lists in a schema."""
    seconds: float = 5.0
    """Of a compilation."""

    def __post_init__(self) -> None:
        """Check every limit.

        Raises:
            InvalidArgumentError: A limit that nothing could keep.
        """
        for name in ("max_bytes", "max_depth", "max_keywords"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least=1))
        seconds = finite_number("seconds", self.seconds, "above 0", lambda x: x > 0)
        object.__setattr__(self, "seconds", seconds)


@dataclass(frozen=True, kw_only=True)
class GrammarSpec:
    """The form of a text. Make one with `json_object`, `json_schema`, `regex` or `lark`."""

    kind: GrammarKind
    text: str = ""
    """The schema as JSON, the regular expression, or the grammar in llguidance's Lark syntax."""
    schemas: tuple[tuple[str, str], ...] = ()
    """Of a Lark grammar: names by which it refers to JSON schemas (`@name`), and these as JSON."""

    @classmethod
    def json_object(cls) -> "GrammarSpec":
        """Any JSON object."""
        return cls(kind="json_object")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool) -> "GrammarSpec":
        """JSON that fits a schema.

        Raises:
            GrammarError: The schema can't be written as JSON.
        """
        return cls(kind="json_schema", text=_to_json(schema))

    @classmethod
    def regex(cls, pattern: str) -> "GrammarSpec":
        """A text that a regular expression matches as a whole (syntax of Rust's regex, without look-around)."""
        return cls(kind="regex", text=pattern)

    @classmethod
    def lark(cls, grammar: str, schemas: Mapping[str, Mapping[str, Any] | bool] | None = None) -> "GrammarSpec":
        """A text by a grammar in llguidance's Lark syntax, as tool calls need it.

        Args:
            grammar: Rules, of which `start` is the first; `<|name|>` stands for a special token.
            schemas: JSON schemas by the name that the grammar gives them: `@name` stands for JSON that fits.

        Raises:
            GrammarError: A schema can't be written as JSON, or a name isn't letters, digits and underscores.
        """
        named = tuple((name, _to_json(schema)) for name, schema in (schemas or {}).items())
        wrong = next((name for name, _ in named if not re.fullmatch(r"[a-z][a-z0-9_]*", name)), None)
        if wrong is not None:
            raise GrammarError(f"a schema's name must be small letters, digits and underscores, got {wrong!r}")
        return cls(kind="lark", text=grammar, schemas=named)

    def checked(self, limits: GrammarLimits) -> "CheckedSpec":
        """The same with its schemas read.

        Raises:
            GrammarError: It is beyond a limit, isn't JSON, or refers to a schema elsewhere.
        """
        texts = (self.text, *(text for _, text in self.schemas))
        size = sum(len(text.encode(errors="surrogatepass")) for text in texts)
        if size > limits.max_bytes:
            raise GrammarError(
                f"the {self._name} has {size} bytes, and {limits.max_bytes} are allowed; make it smaller"
            )
        match self.kind:
            case "json_object":
                return CheckedSpec(spec=self, schemas={"": {"type": "object"}})
            case "json_schema":
                return CheckedSpec(spec=self, schemas={"": read_schema(self.text, limits)})
            case _:
                return CheckedSpec(spec=self, schemas={name: read_schema(text, limits) for name, text in self.schemas})

    @property
    def _name(self) -> str:
        return {"regex": "regular expression", "lark": "grammar"}.get(self.kind, "JSON schema")


@dataclass(frozen=True, kw_only=True)
class CheckedSpec:
    """A specification that keeps the limits."""

    spec: GrammarSpec
    schemas: dict[str, dict[str, Any]]
    """By name; that of a schema alone is empty."""


def read_schema(text: str, limits: GrammarLimits) -> dict[str, Any]:
    """A JSON schema, checked.

    Raises:
        GrammarError: It isn't JSON or no schema, is beyond a limit, or refers to a schema elsewhere.
    """
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the JSON schema can't be read as JSON: {brief(error)}") from error
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise GrammarError(f"a JSON schema must be an object, got {brief(ValueError(text))}; nothing fits `false`")
    for count, (depth, key, value) in enumerate(_walk(schema), start=1):
        if depth > limits.max_depth:
            raise GrammarError(f"the JSON schema is deeper than {limits.max_depth} levels; make it flatter")
        if count > limits.max_keywords:
            raise GrammarError(
                f"the JSON schema has more than {limits.max_keywords} keywords and values; make it smaller"
            )
        if key == "$ref" and isinstance(value, str) and not value.startswith("#"):
            raise GrammarError(
                f"the JSON schema refers to {value!r:.200}; nothing is fetched, so put it under $defs and refer to "
                "'#/$defs/...'"
            )
    return schema


def _walk(schema: Any) -> Iterator[tuple[int, str, Any]]:
    """Depth, key and value of everything in a schema; values that stand for themselves have no key.

    Without recursion: a schema may be deeper than Python's stack.
    """
    waiting: list[tuple[int, Any, bool]] = [(1, schema, True)]
    while waiting:
        depth, node, is_schema = waiting.pop()
        pairs = node.items() if isinstance(node, dict) else (("", item) for item in node)
        for key, value in pairs:
            yield depth, key if is_schema else "", value
            if isinstance(value, dict | list):
                waiting.append((depth + 1, value, is_schema and key not in _VALUES))


def _to_json(schema: object) -> str:
    try:
        return json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"the JSON schema can't be written as JSON: {brief(error)}") from error
