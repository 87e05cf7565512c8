"""Text of one row, from the tokens that it gains."""

from typing import Any

import pytest
from engines import start

from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.engine import Engine
from layerskip.decoding.output.writer import RowWriter
from layerskip.decoding.row import Row
from layerskip.language_model import LanguageModel

PROMPT = [2, 3, 4]
OPTIONS: dict[str, Any] = {"max_new_tokens": 40, "exit_layer": 3, "num_speculations": 3}


def begin(lm: LanguageModel, *, tokenizer: bool = True, **options: Any) -> tuple[Engine, RowWriter]:
    engine = start(lm.decoder, [PROMPT], **{**OPTIONS, **options})
    return engine, RowWriter(engine, engine.rows[0], lm.tokenizer if tokenizer else None, index=7)


@pytest.fixture(scope="module")
def full(text_lm: LanguageModel) -> str:
    return text_lm.generate([PROMPT], **OPTIONS)[0].text


def test_with_and_without_events_the_text_is_the_same(text_lm: LanguageModel, full: str) -> None:
    told, untold = begin(text_lm), begin(text_lm)
    pieces = []
    while told[0].rows:
        for event in told[0].step():
            pieces += list(told[1].write(event))
        for event in untold[0].step():
            untold[1].take([event])
    ends = [writer.finish() for _, writer in (told, untold)]
    assert "".join(event.text for event in pieces) + ends[0].text == full
    assert [event.token_id for event in pieces] == told[1].row.output
    assert {event.index for event in pieces} == {7}
    for end in ends:
        assert (end.index, end.result.text, end.result.finish_reason) == (7, full, "length")
        assert end.result.token_ids == told[1].row.output


@pytest.mark.parametrize("tells", [False, True])
def test_a_stop_string_ends_the_row(text_lm: LanguageModel, full: str, tells: bool) -> None:
    stop = full[10:13]
    engine, writer = begin(text_lm, stop=(stop,))
    while engine.rows:
        for event in engine.step():
            if tells:
                list(writer.write(event))
            else:
                writer.take([event])
    result = writer.finish().result
    assert (result.text, result.finish_reason, result.stop_reason) == (full[: full.find(stop)], "stop", stop)
    assert result.stats.tokens == len(result.token_ids)
    assert engine.free_rows == 1


def test_an_interrupted_row_keeps_what_was_told(text_lm: LanguageModel) -> None:
    engine, writer = begin(text_lm)
    told = [next(iter(writer.write(event))).token_id for _ in range(4) for event in engine.step()]
    gained = len(writer.row.output)
    assert gained > len(told)  # some rounds gave more than one token, of which the first was told
    writer.interrupt()
    result = writer.finish().result
    assert (len(result.token_ids), result.finish_reason) == (len(told), "interrupted")
    assert writer.row.output == result.token_ids
    assert engine.rows == []


def test_an_ended_row_that_was_told_to_its_end_is_not_interrupted(text_lm: LanguageModel) -> None:
    engine, writer = begin(text_lm, max_new_tokens=5)
    while engine.rows:
        for event in engine.step():
            list(writer.write(event))
    writer.interrupt()
    assert writer.finish().result.finish_reason == "length"


def test_without_a_tokenizer_there_are_ids_only(text_lm: LanguageModel) -> None:
    engine, writer = begin(text_lm, tokenizer=False)
    while engine.rows:
        for event in engine.step():
            if event.drafts:
                assert writer.preview(event).text == ""
            assert {piece.text for piece in writer.write(event)} == {""}
    result = writer.finish().result
    assert (result.text, len(result.token_ids)) == ("", 40)


def test_stop_strings_end_rows_while_others_go_on(text_lm: LanguageModel) -> None:
    """Two texts with stop strings and one without, which join one after the other."""
    options: list[dict[str, Any]] = [{"temperature": 0.8, "seed": 1}, {}, {"exit_layer": 2, "num_speculations": 4}]
    prompts = [[5, 6, 7], [9, 10], [20, 21, 22, 23]]
    texts = [text_lm.generate([p], max_new_tokens=30, **o)[0].text for p, o in zip(prompts, options, strict=True)]
    stops = [(text[8:11],) if i < 2 else () for i, text in enumerate(texts)]
    configs = [GenerationConfig(max_new_tokens=30, stop=stop, **o) for stop, o in zip(stops, options, strict=True)]
    expected = [text_lm.generate([p], c)[0] for p, c in zip(prompts, configs, strict=True)]
    engine = Engine(text_lm.decoder, max_rows=3, capacity=64)
    writers: dict[Row, RowWriter] = {}
    waiting = [*zip(prompts, configs, strict=True)]
    while waiting or engine.rows:
        if waiting:
            prompt, config = waiting.pop(0)
            row = engine.add(text_lm.request(prompt, config, seed=config.seed or 0))
            writers[row] = RowWriter(engine, row, text_lm.tokenizer)
        for event in engine.step():
            if not writers[event.row].finished:
                for _ in writers[event.row].write(event):
                    pass
                if event.row.finish_reason is not None:
                    writers[event.row].finish()
    results = [writer.result() for writer in writers.values()]
    assert [(r.text, r.finish_reason, r.stop_reason) for r in results] == [
        (r.text, r.finish_reason, r.stop_reason) for r in expected
    ]
    assert [r.finish_reason for r in results] == ["stop", "stop", "length"]
