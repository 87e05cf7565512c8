"""Rows of an engine as text."""

from typing import Any

from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.engine import Engine
from layerskip.decoding.output.writer import RowWriter
from layerskip.decoding.row import Row
from layerskip.language_model import LanguageModel


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
