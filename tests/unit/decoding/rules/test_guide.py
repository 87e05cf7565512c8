"""A guide follows drafts, goes back with them, and says where a text ends."""

import pytest
import torch
from constraints import Maze
from hypothesis import given
from hypothesis import strategies as st

from layerskip.decoding.rules.guide import Guide, forbid

VOCAB = 40


def allowed_by(guide: Guide, drafts: list[int]) -> list[int] | None:
    mask = guide.at(drafts).forbidden
    return None if mask is None else (~mask).nonzero().flatten().tolist()


def follow(maze: Maze, count: int) -> list[int]:
    """Some allowed tokens, one after the other."""
    fresh, tokens = maze.fresh(), list[int]()
    for i in range(count):
        choices = fresh.allowed()[0]
        tokens.append(choices[i % len(choices)])
        fresh.advance(tokens[-1])
    return tokens


@given(st.data())
def test_what_is_allowed_depends_on_the_tokens_alone(data: st.DataObject) -> None:
    """Whatever was tried before, also drafts that are refused, and whatever was kept."""
    maze = Maze(data.draw(st.integers(0, 20)), VOCAB)
    guide, kept = Guide(maze.fresh(), frozenset(), VOCAB), list[int]()
    for _ in range(data.draw(st.integers(1, 6))):
        fresh = maze.fresh()
        for token in kept:
            fresh.advance(token)
        drafts: list[int] = []
        for _ in range(data.draw(st.integers(0, 5))):
            allowed = fresh.allowed()[0]
            assert allowed_by(guide, drafts) == sorted(allowed)
            assert guide.at(drafts).forced == (allowed[0] if len(allowed) == 1 else None)
            token = data.draw(st.sampled_from([*allowed, 0, VOCAB - 1]))
            if token not in allowed:
                assert allowed_by(guide, [*drafts, token]) is None
                assert guide.at([*drafts, token, 3]).ended
                continue
            fresh.advance(token)
            drafts.append(token)
        assert len(guide.along(drafts)) == len(drafts) + 1
        count = data.draw(st.integers(0, len(drafts)))
        assert guide.take(drafts[:count]) == count
        kept += drafts[:count]


def test_end_tokens_come_where_the_text_may_end_only() -> None:
    maze = Maze(1, VOCAB, forced=0.0)
    allowed, may_end = maze.allowed()
    assert not may_end
    end = allowed[0]
    guide = Guide(maze.fresh(), frozenset({end, VOCAB + 3}), VOCAB)  # one that the network doesn't have
    assert allowed_by(guide, []) == sorted(allowed[1:])
    guide = Guide(Maze(1, VOCAB, forced=0.0, ending=1.0), frozenset({end}), VOCAB)
    assert allowed_by(guide, []) == sorted(allowed)
    assert guide.at([end]).ended
    assert guide.at([end]).error is None
    assert guide.take([end]) == 1


def test_a_complete_text_keeps_no_token_after_it() -> None:
    maze = Maze(2, VOCAB, length=3)
    tokens = follow(maze, 3)
    guide = Guide(maze.fresh(), frozenset(), VOCAB)
    assert guide.at(tokens).complete
    assert guide.at([*tokens, 5]).ended
    assert guide.take([*tokens, 5, 6]) == 3
    assert guide.at().complete


def test_one_token_and_an_end_are_no_choice_of_one() -> None:
    guide = Guide(Maze(0, VOCAB, forced=1.0, ending=1.0), frozenset({39}), VOCAB)
    assert guide.at().forced is None
    assert Guide(Maze(0, VOCAB, forced=1.0, ending=1.0), frozenset(), VOCAB).at().forced is not None


def test_after_an_error_other_drafts_can_be_tried() -> None:
    maze = Maze(3, VOCAB, fails=2, forced=0.0)
    guide = Guide(maze, frozenset(), VOCAB)
    first = maze.allowed()[0][:2]
    one = follow(maze, 2)
    step = guide.at(one)
    assert step.ended
    assert step.error == "nothing can be said after 2 tokens"
    assert allowed_by(guide, [token for token in first if token != one[0]][:1]) is not None
    assert guide.take([*one, 7]) == 2


def test_a_place_without_any_token_is_an_error() -> None:
    class Nothing(Maze):
        def allowed(self) -> tuple[list[int], bool]:
            return [], False

    assert "allows no token" in str(Guide(Nothing(0, VOCAB), frozenset({3}), VOCAB).at().error)


@pytest.mark.parametrize("part", [range(VOCAB), range(10, 31), range(0, 7)])
def test_masks_over_a_part_of_the_vocabulary(part: range) -> None:
    guides = [Guide(Maze(seed, VOCAB), frozenset(), VOCAB) for seed in (1, 2)]
    logits = torch.zeros(3, 2, len(part))
    forbid(logits, [[guides[0].at()], (), [None, guides[1].at()]], part)
    for row, place, guide in ((0, 0, guides[0]), (2, 1, guides[1])):
        allowed = [token for token in allowed_by(guide, []) or [] if token in part]
        assert [part.start + i for i in (logits[row, place] == 0).nonzero().flatten().tolist()] == allowed
    for row, place in ((0, 1), (1, 0), (1, 1), (2, 0)):
        assert not logits[row, place].any()
