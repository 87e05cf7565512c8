"""Chunks of answers: text, tokens in each piece, errors."""

import json
from typing import Any

import pytest

from layerskip.evaluation.load.answer import Answer, AnswerError, error_message


def answer(*chunks: Any) -> Answer:
    found = Answer()
    for place, chunk in enumerate(chunks):
        found.take(chunk if isinstance(chunk, str) else json.dumps(chunk), float(place))
    return found


def text(content: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": content, "finish_reason": None}], **more}


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


def end(number: int, **more: Any) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": number}, **more}


def test_pieces_are_chunks_with_text() -> None:
    found = answer(delta(role="assistant", content=""), delta(content="a"), delta(content="bc"), end(3), "[DONE]")
    assert (found.text, found.times, found.num_tokens, found.done) == ("abc", [1.0, 2.0], 3, True)
    assert found.tokens_by_piece() is None  # three tokens in two pieces: nobody knows where


def test_reasoning_and_tool_calls_are_text_too() -> None:
    calls = [{"index": 0, "function": {"name": "f", "arguments": "{}"}}]
    assert answer(delta(reasoning_content="hm"), delta(content="a"), delta(tool_calls=calls)).text == "hmaf{}"


def test_as_many_pieces_as_tokens() -> None:
    assert answer(text("a"), text("b"), end(2)).tokens_by_piece() == [1, 1]


def test_an_end_token_has_no_text() -> None:
    last = {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}
    assert answer(text("a"), text("b"), last, end(3)).tokens_by_piece() == [1, 1]
    last["choices"][0]["finish_reason"] = "length"
    assert answer(text("a"), text("b"), last, end(3)).tokens_by_piece() is None


def test_usage_in_every_chunk_tells_the_tokens() -> None:
    chunks = [text(t, usage={"completion_tokens": n}) for t, n in (("a", 1), ("bcd", 4), ("", 5), ("é", 6))]
    found = answer(*chunks, end(6))
    assert found.tokens_by_piece() == [1, 3, 2]  # a token without text belongs to the next piece
    assert found.num_tokens == 6


def test_rounds_tell_the_tokens() -> None:
    def tokens(number: int) -> dict[str, Any]:
        return {"tokens": [{"id": 1, "text": "x", "source": "accepted"}] * number}

    found = answer(text("a", speculation=tokens(1)), text("bcd", speculation=tokens(4)), end(5))
    assert found.tokens_by_piece() == [1, 4]


def test_metrics() -> None:
    told = {"num_drafts": 2}
    assert answer(text("a"), end(1, metrics={"speculative_decoding": told})).speculation == told
    assert answer(text("a"), end(1)).speculation is None


@pytest.mark.parametrize("data", ["{", "[1]", "7", '{"error": {"message": "out of memory"}}'])
def test_what_is_no_chunk(data: str) -> None:
    with pytest.raises(AnswerError) as caught:
        answer(data)
    assert caught.value.kind == ("error in the stream" if "error" in data else "unreadable stream")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "no  such\nmodel", "type": "x"}}, "no such model"),
        ({"error": "busy"}, "busy"),
        ({"message": "vLLM's older shape"}, "vLLM's older shape"),
        ({"detail": "Not Found"}, "Not Found"),
        ({"detail": [1]}, None),
        ([], None),
        (None, None),
        ("text", "text"),
    ],
)
def test_messages_of_errors(body: Any, message: str | None) -> None:
    assert error_message(body) == message
