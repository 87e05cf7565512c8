"""The worker of a batch: lines in, records out, with seeds, errors and memory that runs out."""

from typing import Any

import pytest

from layerskip import load
from layerskip.batch.lines import Line
from layerskip.batch.results import Record
from layerskip.batch.worker import BatchWork, BatchWorker, line_seed
from layerskip.decoding.config import GenerationConfig
from layerskip.errors import InvalidArgumentError, OutOfMemoryError, TokenizerError
from layerskip.language_model import LanguageModel

GREEDY = GenerationConfig(max_new_tokens=8)
PROMPTS = ["def add(a, b):", "import os\n", "class Reader:\n    def read(self, path):", "x = 1", "for line in file:"]


def worker_of(lm: LanguageModel, config: GenerationConfig = GREEDY) -> BatchWorker:
    return BatchWork(load=lambda: lm, config=config, seed=0).start()


def lines_of(*prompts: Any) -> list[Line]:
    return [Line(index=i, fields={"index": i, "prompt": prompt}) for i, prompt in enumerate(prompts)]


def by_index(groups: list[list[Record]]) -> list[Record]:
    return sorted((record for group in groups for record in group), key=lambda record: int(record["index"]))


def test_line_seeds_are_seeds_and_differ() -> None:
    seeds = [line_seed(seed, index) for seed in (0, 1, 2**63 - 1) for index in range(1000)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_records_come_as_they_are_finished(demo: LanguageModel) -> None:
    groups = list(worker_of(demo)(lines_of("def f():", "x = 1\n" * 2000, "import os")))
    assert groups[0][0]["index"] == 1
    assert sorted(record["index"] for group in groups[1:] for record in group) == [0, 2]
    assert groups[0][0]["error"].startswith("prompt 1 has")
    for (record,) in groups[1:]:
        assert record["token_ids"] == demo.generate([record["prompt"]], GREEDY)[0].token_ids
        assert record["seed"] == line_seed(0, record["index"])


def test_messages_go_through_the_chat_template(demo: LanguageModel) -> None:
    messages = [{"role": "user", "content": "add"}]
    lines = lines_of(messages, [{"role": "odd", "content": "x"}])
    lm = load("demo")
    decode = worker_of(lm)
    lm.tokenizer.chat_template = None
    with pytest.raises(TokenizerError, match="no chat template"):
        list(decode(lines))
    lm.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'odd' %}{{ raise_exception('no such role') }}{% endif %}"
        "# {{ m.content }}\n{% endfor %}def"
    )
    good, bad = by_index(list(decode(lines)))
    assert good["token_ids"] == demo.generate(["# add\ndef"], GREEDY)[0].token_ids
    assert good["prompt"] == messages
    assert "no such role" in bad["error"]


def test_a_batch_that_does_not_fit_becomes_smaller(demo: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GenerationConfig(max_new_tokens=8, exit_layer=4)  # adaptive decoding measures with caches of its own
    decode, lines = worker_of(demo, config), lines_of(*PROMPTS)
    expected = by_index(list(decode(lines)))
    new_cache, sizes = demo.decoder.new_cache, []

    def small(batch_size: int, capacity: int) -> Any:
        sizes.append(batch_size)
        if batch_size > 1 or capacity > 16:
            raise OutOfMemoryError("no room")
        return new_cache(batch_size, capacity)

    monkeypatch.setattr(demo.decoder, "new_cache", small)
    groups = list(decode(lines))
    assert sizes[:4] == [5, 4, 2, 1]  # fewer at once, then each half by itself
    assert set(sizes[4:]) == {1}
    assert [len(group) for group in groups] == [1] * 5
    for record, whole in zip(by_index(groups), expected, strict=True):
        fits = whole["stats"]["prompt_tokens"] + 8 <= 16
        assert record.get("token_ids") == (whole["token_ids"] if fits else None)
        assert record.get("error") == (None if fits else "no room")
    assert {"error" in record for group in groups for record in group} == {True, False}


def test_what_all_lines_share_is_checked_at_the_start(demo: LanguageModel) -> None:
    with pytest.raises(InvalidArgumentError, match="exit"):
        worker_of(demo, GenerationConfig(exit_layer=99))
