"""Which documents are held out."""

from typing import Any

import pytest

from layerskip.errors import InvalidArgumentError
from layerskip.training.data.reading.documents import (
    ChatDocument,
    CompletionDocument,
    Document,
    InstructionDocument,
    TextDocument,
)
from layerskip.training.data.split import Split, choose_split, cut_tail, is_held_out

HELD_OUT_AT_2_PERCENT = "text 66"  # the side of a text must never change: results of old runs would be wrong


def text(content: str, origin: str = "") -> TextDocument:
    return TextDocument(origin=origin, text=content)


def examples(count: int) -> list[Document]:
    return [CompletionDocument(origin="", prompt=f"{number}", completion="x") for number in range(count)]


def test_the_side_never_changes() -> None:
    held_out = [f"text {number}" for number in range(100) if is_held_out(text(f"text {number}"), 0.02)]
    assert held_out == [HELD_OUT_AT_2_PERCENT]


def test_the_side_depends_on_content_only() -> None:
    for number in range(50):
        sides = {
            is_held_out(text(content, origin), 0.3)
            for content in (f"a {number}\nb", f"a {number}  \nb\n\n") for origin in ("x", "y")
        }  # fmt: skip
        assert len(sides) == 1


def test_the_share_is_about_right_and_shares_are_nested() -> None:
    documents = [text(f"{number}") for number in range(4000)]
    small, large = ({d.text for d in documents if is_held_out(d, share)} for share in (0.1, 0.3))
    assert small < large
    assert abs(len(small) - 400) < 80
    assert abs(len(large) - 1200) < 120
    assert not any(is_held_out(document, 0.0) for document in documents)


def test_kinds_with_the_same_words_differ() -> None:
    pair = CompletionDocument(origin="", prompt="a", completion="b")
    other = CompletionDocument(origin="", prompt="ab", completion="")
    chat = ChatDocument(origin="", messages=({"role": "user", "content": "ab"},))
    assert len({pair.content_hash, other.content_hash, chat.content_hash, text("ab").content_hash}) == 4


def test_usually_the_hash_decides() -> None:
    documents: list[Any] = [text(f"text {number}") for number in range(100)]
    split = choose_split(documents, 0.02)
    sides = [side for document in documents for _, side in split.divide(document)]
    assert sides.count(True) == 1
    assert sides.index(True) == 66


def test_a_single_text_loses_its_last_lines() -> None:
    whole = "".join(f"line {number}\n" for number in range(1000))
    for content in (whole, whole + HELD_OUT_AT_2_PERCENT):  # whatever its hash
        parts = list(choose_split([text(content)], 0.1).divide(text(content)))
        assert [side for _, side in parts] == [False, True]
        head, tail = (part.plain_text for part, _ in parts)
        assert head + tail == content
        assert head.endswith("\n")
        assert 0.09 < len(tail) / len(content) < 0.11


def test_a_single_text_that_would_be_held_out_is_cut_as_well() -> None:
    split = choose_split([text(HELD_OUT_AT_2_PERCENT)], 0.02)
    assert [side for _, side in split.divide(text(HELD_OUT_AT_2_PERCENT))] == [False, True]


def test_few_examples_of_which_the_hash_holds_out_none() -> None:
    documents = [document for document in examples(40) if not is_held_out(document, 0.02)]
    split = choose_split(documents, 0.02)
    assert [side for document in documents for _, side in split.divide(document)].count(True) == 1


def test_few_examples_of_which_the_hash_holds_out_all() -> None:
    documents = [document for document in examples(40) if is_held_out(document, 0.3)]
    assert len(documents) > 2
    split = choose_split(documents, 0.3)
    assert [side for document in documents for _, side in split.divide(document)].count(True) == 1


def test_a_single_example_cannot_be_split() -> None:
    with pytest.raises(InvalidArgumentError, match="single example, or all examples have the same prompt; add"):
        choose_split(examples(1), 0.1)
    same = [CompletionDocument(origin="", prompt="a", completion=str(number)) for number in range(20)]
    with pytest.raises(InvalidArgumentError, match="all examples have the same prompt; add data, or set held_out to 0"):
        choose_split(same, 0.1)


def test_answers_to_one_prompt_are_on_the_same_side() -> None:
    for number in range(50):
        asked = {"role": "user", "content": f"Why {number}?"}
        chats = [
            ChatDocument(origin="", messages=(asked, {"role": "assistant", "content": answer})) for answer in "abcdef"
        ]
        pairs = [CompletionDocument(origin="", prompt=str(number), completion=answer) for answer in "abcdef"]
        tasks = [
            InstructionDocument(origin="", instruction=str(number), input="", output=answer) for answer in "abcdef"
        ]
        for kind in (chats, pairs, tasks):
            assert len({document.content_hash for document in kind}) == 6
            assert len({is_held_out(document, 0.5) for document in kind}) == 1


def test_no_share_holds_out_nothing() -> None:
    assert choose_split([], 0.0) == Split(share=0.0)
    assert [side for d in examples(9) for _, side in choose_split(examples(9), 0.0).divide(d)] == [False] * 9


@pytest.mark.parametrize(
    ("content", "tail"),
    [
        ("aaaa\n" * 10, "aaaa\n"),
        ("word " * 9 + "end", " word end"),
        ("x" * 50, "x" * 5),
        ("a\n" + "x" * 98, "x" * 10),  # the only line break is far away
    ],
)
def test_tails_are_cut_at_lines_or_words_nearby(content: str, tail: str) -> None:
    head, cut = cut_tail(content, 0.1)
    assert head + cut == content
    assert cut == tail
