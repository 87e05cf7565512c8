"""Kinds of documents: plain texts, prompts with completions, instructions, and conversations."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import takewhile
from typing import Any

HASH_BYTES = 8
# Word for word: models that were trained on Alpaca's data know these.
ALPACA = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Response:
"""
ALPACA_WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. Write a response \
that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:
"""


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
    def prompt_hash(self) -> int:
        """The same: a text has no prompt."""
        return self.content_hash

    @property
    def plain_text(self) -> str:
        """All of it as one text."""
        return self.text


@dataclass(frozen=True, kw_only=True)
class CompletionDocument:
    """A prompt with its completion; only the completion is learned."""

    origin: str
    prompt: str
    completion: str

    @cached_property
    def content_hash(self) -> int:
        """Hash of prompt and completion, whatever the origin."""
        return _hash("completion", self.prompt, self.completion)

    @cached_property
    def prompt_hash(self) -> int:
        """Hash of the prompt, which completions of it share."""
        return _hash("completion", self.prompt)

    @property
    def plain_text(self) -> str:
        """All of it as one text."""
        return self.prompt + self.completion


@dataclass(frozen=True, kw_only=True)
class ChatDocument:
    """A conversation; only the assistant's answers are learned."""

    origin: str
    messages: tuple[Mapping[str, Any], ...]
    """Messages for a chat template: `role`, `content`, and other keys that the template uses, such as `tool_calls`."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas of the functions that the assistant may call."""

    @cached_property
    def content_hash(self) -> int:
        """Hash of the messages and tools, whatever the origin."""
        parts = (*self.messages, *self.tools)
        return _hash("chat", *(json.dumps(dict(part), sort_keys=True, default=str) for part in parts))

    @cached_property
    def prompt_hash(self) -> int:
        """Hash of the messages before the first answer, which answers to them share."""
        before = takewhile(lambda message: message.get("role") != "assistant", self.messages)
        return _hash("chat", *(json.dumps(dict(part), sort_keys=True, default=str) for part in before))

    @property
    def plain_text(self) -> str:
        """All of it as one text, without the chat template's markers."""
        return "\n".join(message["content"] for message in self.messages if message.get("content"))


@dataclass(frozen=True, kw_only=True)
class InstructionDocument:
    """A task and its solution, as in Alpaca's data; only the output is learned.

    With a chat template, the task becomes a question and its answer; otherwise it is put into Alpaca's own words.
    """

    origin: str
    instruction: str
    input: str
    """Input of the task; empty if the instruction needs none."""
    output: str

    @cached_property
    def content_hash(self) -> int:
        """Hash of the three texts, whatever the origin."""
        return _hash("instruction", self.instruction, self.input, self.output)

    @cached_property
    def prompt_hash(self) -> int:
        """Hash of the task, which solutions of it share."""
        return _hash("instruction", self.instruction, self.input)

    @property
    def conversation(self) -> ChatDocument:
        """The same as a conversation of one question and one answer."""
        question = "\n\n".join(part for part in (self.instruction, self.input) if part.strip())
        return ChatDocument(
            origin=self.origin,
            messages=({"role": "user", "content": question}, {"role": "assistant", "content": self.output}),
        )

    @property
    def completion(self) -> CompletionDocument:
        """The same as a prompt and a completion, for models without a chat template."""
        prompt = ALPACA_WITH_INPUT if self.input.strip() else ALPACA
        return CompletionDocument(
            origin=self.origin,
            prompt=prompt.format(instruction=self.instruction, input=self.input),
            completion=self.output,
        )

    @property
    def plain_text(self) -> str:
        """All of it as one text."""
        return self.completion.plain_text


Document = TextDocument | CompletionDocument | ChatDocument | InstructionDocument


def _hash(kind: str, *parts: str) -> int:
    digest = blake2b(kind.encode(), digest_size=HASH_BYTES)
    for part in parts:
        normal = "\n".join(line.rstrip() for line in part.split("\n")).rstrip().encode()
        digest.update(len(normal).to_bytes(8, "big") + normal)
    return int.from_bytes(digest.digest(), "big")
