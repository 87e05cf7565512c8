"""The parser of event streams: the same events wherever the bytes are cut."""

import random

import pytest

from layerskip.evaluation.load.sse import EventParser

STREAM = (
    b"\xef\xbb\xbf: a comment\n\n"
    b'event: message\ndata: {"text": "\xc3\xa4\xf0\x9f\x99\x82"}\nid: 7\n\n'
    b"data:no space\r\n\r\n"
    b"data: first line\rdata: second line\r\r"
    b"data\n\n"
    b"retry: 100\n\n\n"
    b"data:  two spaces\r\ndata:\r\n\r\n"
    b"data: [DONE]\n\n"
    b"data: never ended"
)
EVENTS = [
    '{"text": "ä🙂"}',
    "no space",
    "first line\nsecond line",
    "",
    " two spaces\n",
    "[DONE]",
]


def parse(*parts: bytes) -> list[str]:
    parser = EventParser()
    return [event for part in parts for event in parser.push(part)]


def test_a_stream_in_one_piece() -> None:
    assert parse(STREAM) == EVENTS


@pytest.mark.parametrize("place", range(len(STREAM) + 1))
def test_cut_at_every_position(place: int) -> None:
    assert parse(STREAM[:place], b"", STREAM[place:]) == EVENTS


def test_byte_by_byte() -> None:
    assert parse(*(bytes([byte]) for byte in STREAM)) == EVENTS


@pytest.mark.parametrize("seed", range(20))
def test_cut_at_random(seed: int) -> None:
    draw, parts, left = random.Random(seed), [], STREAM
    while left:
        size = draw.randint(1, 9)
        parts.append(left[:size])
        left = left[size:]
    assert parse(*parts) == EVENTS


def test_an_event_is_given_with_its_last_byte() -> None:
    parser = EventParser()
    assert parser.push(b"data: x\n") == []
    assert parser.push(b"\n") == ["x"]
    assert parser.push(b"data: y\r") == []
    assert parser.push(b"\r") == ["y"]  # without waiting for what may follow
    assert parser.push(b"\ndata: z\n\n") == ["z"]


def test_bytes_that_are_no_text_are_replaced() -> None:
    assert parse(b"data: a\xffb\n\n") == ["a\ufffdb"]
