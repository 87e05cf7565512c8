"""A row: what it gains, where it ends, and how it is cut short."""

import pytest

from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.request import Request
from layerskip.decoding.row import Row


def make_row(*tokens: int, max_new_tokens: int = 5, ends: tuple[int, ...] = ()) -> Row:
    request = Request(
        tokens=tokens,
        config=GenerationConfig(),
        seed=0,
        max_new_tokens=max_new_tokens,
        eos_token_ids=frozenset(ends),
    )
    return Row(request=request, tokens=list(tokens))


def test_a_row_knows_its_output_and_what_remains() -> None:
    row = make_row(1, 2)
    assert (row.prompt_length, row.output, row.remaining) == (2, [], 5)
    assert row.append((3, 4)) == (3, 4)
    assert (row.prompt_length, row.output, row.remaining, row.round_start) == (2, [3, 4], 3, 2)
    assert (row.finish_reason, row.stop_reason) == (None, None)


def test_a_row_ends_at_its_limit() -> None:
    row = make_row(1, 2, max_new_tokens=2)
    assert row.append((3, 4)) == (3, 4)
    assert (row.output, row.remaining, row.finish_reason, row.stop_reason) == ([3, 4], 0, "length", None)


@pytest.mark.parametrize(
    ("gained", "kept"), [((9, 3), (9,)), ((3, 8, 9, 4), (3, 8)), ((3, 4, 9), (3, 4, 9)), ((3, 4), (3, 4))]
)
def test_a_row_ends_with_the_first_token_that_ends_it(gained: tuple[int, ...], kept: tuple[int, ...]) -> None:
    row = make_row(1, 9, ends=(8, 9))  # one in the prompt ends nothing
    assert row.append(gained) == kept
    assert row.output == list(kept)
    ended = kept[-1] in (8, 9)
    assert (row.finish_reason, row.stop_reason) == (("stop", kept[-1]) if ended else (None, None))


def test_the_last_token_allowed_may_end_it() -> None:
    row = make_row(1, max_new_tokens=2, ends=(9,))
    row.append((3, 9))
    assert (row.finish_reason, row.stop_reason) == ("stop", 9)


def test_a_cut_keeps_the_beginning_and_corrects_the_statistics() -> None:
    row = make_row(1, 2, max_new_tokens=9)
    row.append((3,))
    tokens = row.tokens
    row.append((4, 5, 6))
    row.recorder.record_round(3, 2, start=row.round_start)  # 4 and 5 were accepted drafts
    row.cut(2)
    assert row.output == [3, 4]
    assert row.tokens is tokens  # whoever holds the list sees it
    assert row.recorder.accepted_by_position == [1, 0, 0]
    row.cut(0)
    assert (row.output, row.tokens) == ([], [1, 2])
    assert row.recorder.accepted_by_position == [0, 0, 0]


def test_matches_follow_the_row() -> None:
    row = make_row(5, 6, 7, 5, 6)
    match = row.ngrams.match()
    assert match is not None
    assert match.continuation(2) == [7, 5]
    row.append((8,))
    assert row.ngrams.match() is None
    row.append((5, 6))
    match = row.ngrams.match()
    assert match is not None
    assert match.continuation(1) == [8]  # the latest occurrence
