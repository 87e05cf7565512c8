"""What `/v1/responses` tells of an answer: its items, and the events by which a stream tells of them."""

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from layerskip.serving.conversation.deltas import Arguments, CallStart, Content, Delta

Event = dict[str, Any]


class ResponseWriter:
    """Turns content and calls into items of output, one after the other, and tells what happens to them."""

    def __init__(self) -> None:
        """Begin before the first item."""
        self.output: list[dict[str, Any]] = []
        """Items that have begun."""
        self._number = 0
        self._events: list[Event] = []
        self._is_open = False
        self._logprobs: list[dict[str, Any]] = []
        """Of tokens whose text hasn't been given yet."""

    def event(self, kind: str, **fields: Any) -> Event:
        """An event with the next number."""
        made = {"type": f"response.{kind}", "sequence_number": self._number, **fields}
        self._number += 1
        return made

    def add(self, found: Sequence[Delta], logprobs: Sequence[dict[str, Any]] = ()) -> list[Event]:
        """Take content and calls.

        Args:
            found: What there is, in its order.
            logprobs: Of the tokens behind it, if they are asked for.

        Returns:
            Events that tell of it.
        """
        self._logprobs += logprobs
        for delta in found:
            match delta:
                case Content(text=text):
                    self._add_text(text)
                case CallStart():
                    self._begin_call(delta)
                case Arguments(text=text):
                    self.output[-1]["arguments"] += text
                    self._tell("function_call_arguments.delta", delta=text)
        return self._take()

    def finish(self, status: str) -> list[Event]:
        """End the last item; an answer without any has an empty message.

        Args:
            status: completed or incomplete.
        """
        if not self.output:
            self._begin_message()
        self._close(status)
        return self._take()

    def _add_text(self, text: str) -> None:
        if not (self._is_open and self.output[-1]["type"] == "message"):
            self._close("completed")
            self._begin_message()
        logprobs, self._logprobs = self._logprobs, []
        part = self.output[-1]["content"][0]
        part["text"] += text
        part["logprobs"] += logprobs
        self._tell("output_text.delta", content_index=0, delta=text, logprobs=logprobs)

    def _begin_message(self) -> None:
        content: list[dict[str, Any]] = []
        item = {"id": _name("msg"), "type": "message", "status": "in_progress", "role": "assistant", "content": content}
        self._begin(item)
        part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._tell("content_part.added", content_index=0, part=dict(part, annotations=[], logprobs=[]))
        item["content"] = [part]

    def _begin_call(self, call: CallStart) -> None:
        self._close("completed")
        self._logprobs = []
        item = {
            "id": _name("fc"),
            "type": "function_call",
            "status": "in_progress",
            "call_id": call.id,
            "name": call.name,
            "arguments": "",
        }
        self._begin(item)

    def _begin(self, item: dict[str, Any]) -> None:
        self.output.append(item)
        self._is_open = True
        self._events.append(self.event("output_item.added", output_index=len(self.output) - 1, item=dict(item)))

    def _close(self, status: str) -> None:
        if not self._is_open:
            return
        self._is_open = False
        item = self.output[-1]
        item["status"] = status
        if item["type"] == "message":
            (part,) = item["content"]
            self._tell("output_text.done", content_index=0, text=part["text"], logprobs=part["logprobs"])
            self._tell("content_part.done", content_index=0, part=part)
        else:
            self._tell("function_call_arguments.done", name=item["name"], arguments=item["arguments"])
        self._events.append(self.event("output_item.done", output_index=len(self.output) - 1, item=item))

    def _tell(self, kind: str, **fields: Any) -> None:
        """An event about the last item."""
        item_id = self.output[-1]["id"]
        self._events.append(self.event(kind, item_id=item_id, output_index=len(self.output) - 1, **fields))

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return events


def _name(kind: str) -> str:
    return f"{kind}_{uuid4().hex}"
