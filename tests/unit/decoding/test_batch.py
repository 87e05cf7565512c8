"""Rows of a generation and how they are dropped."""

import pytest

from layerskip.decoding.batch import Batch, Row
from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.engine import make_batch
from layerskip.language_model import LanguageModel


@pytest.fixture
def batch(text_lm: LanguageModel) -> Batch:
    config = GenerationConfig(max_new_tokens=4, no_repeat_ngram_size=2)
    batch = make_batch(text_lm.decoder, [[10 + i] * (i + 1) for i in range(4)], config, eos_token_ids=(1,), seed=9)
    for place, row in enumerate(batch.rows):  # as if each prompt had been read and given one token
        batch.cache.commit(place, len(row.tokens))
        batch.cache.keys[:, place, : len(row.tokens)] = row.index
        row.tokens.append(20 + place)
    return batch


def test_a_row_knows_its_output_and_what_remains() -> None:
    row = Row(index=0, tokens=[1, 2, 3, 4], prompt_length=2, max_new_tokens=5, seed=0)
    assert (row.output, row.remaining) == ([3, 4], 3)
    tokens = row.tokens
    row.finish("stop", "END", length=1)
    assert (row.output, row.finish_reason, row.stop_reason) == ([3], "stop", "END")
    assert row.tokens is tokens  # a session shares the list


def test_a_row_may_end_with_all_its_tokens() -> None:
    row = Row(index=0, tokens=[1, 2, 3, 4], prompt_length=2, max_new_tokens=2, seed=0)
    row.finish("length")
    assert (row.output, row.remaining, row.stop_reason) == ([3, 4], 0, None)


@pytest.mark.parametrize("finished", [(0,), (3,), (1, 2), (0, 3), (0, 1, 2), (0, 1, 2, 3), ()])
def test_finished_rows_go_and_the_cache_follows(batch: Batch, finished: tuple[int, ...]) -> None:
    rows = list(batch.rows)
    for index in finished:
        rows[index].finish("length")
    batch.drop_finished()
    assert sorted(row.index for row in batch.rows) == [i for i in range(4) if i not in finished]
    for place, row in enumerate(batch.rows):
        length = len(row.tokens) - 1
        assert batch.cache.lengths[place] == length
        assert (batch.cache.keys[:, place, :length] == row.index).all()


def test_contexts_grow_by_drafts(batch: Batch) -> None:
    assert batch.contexts() == [[row.tokens] for row in batch.rows]
    contexts = batch.contexts([[7, 8]] * 4)
    assert contexts is not None
    assert contexts[1] == [[11, 11, 21], [11, 11, 21, 7], [11, 11, 21, 7, 8]]


def test_pending_tokens_and_seeds(batch: Batch) -> None:
    assert batch.pending().tolist() == [[20], [21], [22], [23]]
    assert batch.seeds == [9, 9, 9, 9]
