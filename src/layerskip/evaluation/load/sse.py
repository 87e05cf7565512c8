"""Server-sent events from bytes, wherever the network has cut them."""


class EventParser:
    """Takes bytes as they come, and gives the data of whole events.

    Lines end with a line feed, a carriage return, or both. Events end with an empty line; comments, and fields other
    than `data`, are passed over.

    Source: https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
    """

    def __init__(self) -> None:
        """Nothing was read yet."""
        self._line = bytearray()
        self._data: list[bytes] = []
        self._after_return = False
        self._first = True

    def push(self, content: bytes) -> list[str]:
        """Take more bytes.

        Args:
            content: Any number of bytes.

        Returns:
            Data of the events that these bytes have completed.
        """
        events: list[str] = []
        if self._after_return and content:
            self._after_return = False
            content = content.removeprefix(b"\n")
        while content:
            end = min((place for place in (content.find(b"\n"), content.find(b"\r")) if place >= 0), default=-1)
            if end < 0:
                self._line += content
                break
            self._line += content[:end]
            width = 2 if content[end : end + 2] == b"\r\n" else 1
            self._after_return = content[end : end + 1] == b"\r" and end + 1 == len(content)
            content = content[end + width :]
            event = self._end_line()
            if event is not None:
                events.append(event)
        return events

    def _end_line(self) -> str | None:
        """Interpret a whole line; the data of an event that it ends."""
        line = bytes(self._line)
        self._line.clear()
        if self._first:
            line, self._first = line.removeprefix(b"\xef\xbb\xbf"), False
        if not line:
            if not self._data:
                return None
            data = b"\n".join(self._data).decode("utf-8", "replace")
            self._data.clear()
            return data
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
        return None
