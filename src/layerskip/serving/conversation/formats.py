"""How models write calls of functions."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WHITE = " \t\r\n"
"""White space as JSON has it."""


@dataclass(frozen=True, kw_only=True)
class CallFormat:
    """A way to write calls.

    What is read is more than what is written: a single call or a list of them, with white space anywhere, and the
    arguments under either of the two names.
    """

    name: str
    opening: str
    """Text in front of calls; empty: an answer that begins with a JSON object is a call."""
    closing: str
    """Text after calls, if there is one."""
    key: str
    """What the arguments are called."""
    is_list: bool
    """Whether calls are written as a list, also a single one."""
    gap: str = ""
    """White space between the opening and the calls, and between these and the closing."""
    optional: str = ""
    """A mark that some models write in front of calls, without need."""

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that may be special tokens."""
        return tuple(filter(None, (self.opening, self.closing, self.optional)))

    def head(self, name: str) -> str:
        """A call up to its arguments."""
        return f'{{"name": {json.dumps(name)}, "{self.key}": '

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """Calls as a model would have written them.

        Args:
            calls: Names and arguments.
        """
        texts = [f"{self.head(name)}{json.dumps(arguments, ensure_ascii=False)}}}" for name, arguments in calls]
        if self.is_list:
            return f"{self.opening}{self.gap}[{', '.join(texts)}]{self.gap if self.closing else ''}{self.closing}"
        if not self.opening:
            return "; ".join(texts)
        return "\n".join(f"{self.opening}{self.gap}{text}{self.gap}{self.closing}" for text in texts)


HERMES = CallFormat(
    name="hermes", opening="<tool_call>", closing="</tool_call>", key="arguments", is_list=False, gap="\n"
)
"""Hermes, Qwen 2.5 and 3, SmolLM3 and others; SmolLM2 with a list between the marks."""
MISTRAL = CallFormat(name="mistral", opening="[TOOL_CALLS]", closing="", key="arguments", is_list=True)
"""Mistral up to version 3 of its tokenizer."""
LLAMA = CallFormat(name="llama", opening="", closing="", key="parameters", is_list=False, optional="<|python_tag|>")
"""Llama 3.1, 3.2 and 3.3."""
FORMATS = (HERMES, MISTRAL, LLAMA)
