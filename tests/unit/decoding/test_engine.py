"""The loop over tokens: what it checks, what it tells, what a caller may do in between."""

from typing import Any

import pytest

from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.engine import Committed, Drafted, choose_exit_layer, decode, default_exit_layer, make_batch
from layerskip.errors import InvalidArgumentError, PromptError
from layerskip.language_model import LanguageModel


def run(lm: LanguageModel, prompts: list[list[int]], **options: Any) -> list[Drafted | Committed]:
    config = GenerationConfig(**options)
    batch = make_batch(lm.decoder, prompts, config, eos_token_ids=(), seed=0)
    return list(decode(batch, show_drafts=True))


def test_the_exit_is_a_quarter_of_the_layers_if_not_given(text_lm: LanguageModel) -> None:
    assert [default_exit_layer(n) for n in (1, 3, 4, 7, 8, 32)] == [1, 1, 1, 1, 2, 8]
    decoder = text_lm.decoder
    assert choose_exit_layer(GenerationConfig(), decoder) == 1
    assert choose_exit_layer(GenerationConfig(generation_strategy="autoregressive"), decoder) == 5
    assert choose_exit_layer(GenerationConfig(exit_layer=5), decoder) == 5


@pytest.mark.parametrize("strategy", ["autoregressive", "self_speculative"])
def test_an_exit_beyond_the_network_is_refused(text_lm: LanguageModel, strategy: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"exit_layer 6 is outside 1\.\.5"):
        text_lm.generate([[2]], exit_layer=6, generation_strategy=strategy)


def test_drafts_come_before_what_became_of_them(text_lm: LanguageModel) -> None:
    events = run(text_lm, [[2, 3, 4]], max_new_tokens=30, exit_layer=3, num_speculations=3)
    assert isinstance(events[0], Committed)
    assert (events[0].num_drafted, len(events[0].tokens)) == (0, 1)
    for drafted, committed in zip(events[1::2], events[2::2], strict=True):
        assert isinstance(drafted, Drafted)
        assert isinstance(committed, Committed)
        assert committed.num_drafted == len(drafted.tokens)
        assert committed.tokens[: committed.num_accepted] == drafted.tokens[: committed.num_accepted]
        assert len(committed.tokens) == committed.num_accepted + 1
    row = events[0].row
    assert [t for e in events if isinstance(e, Committed) for t in e.tokens] == row.output
    assert (row.finish_reason, row.remaining) == ("length", 0)


def test_showing_drafts_changes_nothing(text_lm: LanguageModel) -> None:
    config = GenerationConfig(max_new_tokens=30, exit_layer=3, do_sample=True)
    shown, hidden = (
        [
            (event.tokens, event.num_accepted)
            for event in decode(
                make_batch(text_lm.decoder, [[2], [3, 4]], config, eos_token_ids=(), seed=1), show_drafts=show
            )
            if isinstance(event, Committed)
        ]
        for show in (True, False)
    )
    assert shown == hidden


def test_a_caller_may_end_a_row(text_lm: LanguageModel) -> None:
    """The ended row gets no more events; the other goes on as if it were alone."""
    config = GenerationConfig(max_new_tokens=20, exit_layer=3)
    batch = make_batch(text_lm.decoder, [[2, 3], [5, 6, 7]], config, eos_token_ids=(), seed=0)
    rows = list(batch.rows)
    for event in decode(batch):
        assert event.row.finish_reason is None or event.row.index == 1
        if event.row.index == 0 and len(event.row.output) >= 5:
            event.row.finish("stop", "enough", length=4)
    assert len(rows[0].output) == 4
    assert rows[1].output == text_lm.generate([[5, 6, 7]], config)[0].token_ids
    assert batch.rows == []


def test_prompts_are_checked(text_lm: LanguageModel) -> None:
    vocab, context = text_lm.config.vocab_size, text_lm.decoder.max_context
    config = GenerationConfig(max_new_tokens=3)

    def make(prompts: Any) -> Any:
        return make_batch(text_lm.decoder, prompts, config, eos_token_ids=(), seed=0)

    with pytest.raises(InvalidArgumentError, match="no prompts"):
        make([])
    with pytest.raises(PromptError, match="prompt 1 is empty"):
        make([[2], []])
    for bad in (vocab, -1, True, 2.0):
        with pytest.raises(PromptError, match=rf"prompt 0 has token id {bad!r}; allowed .* 0\.\.{vocab - 1}"):
            make([[2, bad]])
    with pytest.raises(PromptError, match=f"prompt 0 has {context} tokens, and the context of {context}"):
        make([[2] * context])
    assert make([[2] * (context - 1)]).rows[0].max_new_tokens == 1


def test_the_cache_is_as_large_as_needed(text_lm: LanguageModel) -> None:
    config = GenerationConfig(max_new_tokens=10)
    batch = make_batch(text_lm.decoder, [[2] * 5, [2] * 20], config, eos_token_ids=(), seed=0)
    assert (batch.cache.num_rows, batch.cache.capacity) == (2, 30)
