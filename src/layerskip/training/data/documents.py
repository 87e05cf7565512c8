"""What sources are made of: plain texts, prompts with completions, and conversations."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

HASH_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class TextDocument:
    """A text that is learned from its first to its last token."""

    origin: str
    """Where it is from, for error messages: a path, or a file or data set and the record's number."""
    text: str

    @cached_property
    def content_hash(self) -> int:
        """Hash of the content, whatever the origin; texts that differ in trailing whitespace only have the same."""
        return _hash("text", self.text)

    @property
    def plain_text(self) -> str:
        """All of it as one text."""
        return self.text


@dataclass(frozen=True, kw_only=True)
class CompletionDocument:
    """A prompt and what should follow it; only the completion is learned."""

    origin: str
    prompt: str
    completion: str

    @cached_property
    def content_hash(self) -> int:
        """Hash of prompt and completion, whatever the origin."""
        return _hash("completion", self.prompt, self.completion)

    @property
    def plain_text(self) -> str:
        """All of it as one text."""
        return self.prompt + self.completion


@dataclass(frozen=True, kw_only=True)
class ChatDocument:
    """A conversation; only what the assistant says is learned."""

    origin: str
    messages: tuple[Mapping[str, Any], ...]
    """As chat templates take them: `role`, `content`, and whatever else the template knows, such as `tool_calls`."""

    @cached_property
    def content_hash(self) -> int:
        """Hash of the messages, whatever the origin."""
        return _hash("chat", *(json.dumps(dict(m), sort_keys=True, default=str) for m in self.messages))

    @property
    def plain_text(self) -> str:
        """All of it as one text, without the chat template's markers."""
        return "\n".join(message["content"] for message in self.messages if message.get("content"))


Document = TextDocument | CompletionDocument | ChatDocument


def _hash(kind: str, *parts: str) -> int:
    digest = blake2b(kind.encode(), digest_size=HASH_BYTES)
    for part in parts:
        normal = "\n".join(line.rstrip() for line in part.split("\n")).rstrip().encode()
        digest.update(len(normal).to_bytes(8, "big") + normal)
    return int.from_bytes(digest.digest(), "big")
