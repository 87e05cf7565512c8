"""A batch as a whole: texts in the input's order, whatever is decoded together, fails or is interrupted."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from layerskip.batch.lines import read_lines
from layerskip.batch.results import PartialResults, Record
from layerskip.batch.run import run_batch
from layerskip.batch.worker import BatchWork, line_seed
from layerskip.decoding.config import GenerationConfig
from layerskip.errors import InvalidArgumentError
from layerskip.language_model import LanguageModel
from layerskip.workers.fan_out import Worker, in_process

GREEDY = GenerationConfig(max_new_tokens=8)
SAMPLED = GenerationConfig(max_new_tokens=8, temperature=0.9, seed=5)
PROMPTS = ["def add(a, b):", "import os\n", "class Reader:\n    def read(self, path):", "x = 1", "for line in file:"]


def work_of(lm: LanguageModel, config: GenerationConfig, results: PartialResults, batch_size: int) -> BatchWork:
    return BatchWork(load=lambda: lm, config=config, seed=results.seed, batch_size=batch_size)


def write(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def prompts_file(folder: Path, prompts: Sequence[str] = PROMPTS) -> Path:
    return write(folder / "prompts.jsonl", [{"prompt": prompt, "id": f"#{i}"} for i, prompt in enumerate(prompts)])


def decode_file(lm: LanguageModel, file: Path, output: Path, config: GenerationConfig, batch_size: int) -> list[Record]:
    lines, digest = read_lines(file)
    results = PartialResults(output, config, {"input": digest})
    run_batch(work_of(lm, config, results, batch_size), lines, results, group_size=batch_size)
    return read(output)


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def without_stats(records: Sequence[Record]) -> list[Record]:
    return [{key: value for key, value in record.items() if key != "stats"} for record in records]


def test_output_has_the_texts_of_generate_in_order(demo: LanguageModel, tmp_path: Path) -> None:
    records = decode_file(demo, prompts_file(tmp_path), tmp_path / "out.jsonl", GREEDY, 2)
    expected = [demo.generate([prompt], GREEDY)[0] for prompt in PROMPTS]
    assert [record["token_ids"] for record in records] == [result.token_ids for result in expected]
    assert [record["text"] for record in records] == [result.text for result in expected]
    assert [record["prompt"] for record in records] == PROMPTS
    keys = ["index", "id", "prompt", "text", "token_ids", "finish_reason", "seed", "stats"]
    assert all(list(record) == keys for record in records)
    assert [record["id"] for record in records] == [f"#{i}" for i in range(len(PROMPTS))]
    assert records[0]["stats"]["tokens"] == len(records[0]["token_ids"])


def test_a_sampled_text_depends_on_its_line_alone(demo: LanguageModel, tmp_path: Path) -> None:
    same = ["def add(a, b):"] * 3
    runs = [
        decode_file(demo, prompts_file(tmp_path, [*same, *PROMPTS]), tmp_path / f"{size}.jsonl", SAMPLED, size)
        for size in (1, 3, 8)
    ]
    assert without_stats(runs[0]) == without_stats(runs[1]) == without_stats(runs[2])
    assert len({record["text"] for record in runs[0][:3]}) == 3
    for record in runs[0]:
        assert record["seed"] == line_seed(5, record["index"])
        alone = demo.generate([record["prompt"]], SAMPLED, seed=record["seed"])[0]
        assert record["token_ids"] == alone.token_ids


def test_a_line_that_cannot_be_decoded_does_not_stop_the_others(demo: LanguageModel, tmp_path: Path) -> None:
    file = prompts_file(tmp_path, ["def f():", "x = 1\n" * 2000, "", "import os"])
    lines, _ = read_lines(file)
    results = PartialResults(tmp_path / "out.jsonl", GREEDY, {})
    told: list[int] = []
    summary = run_batch(work_of(demo, GREEDY, results, 4), lines, results, on_progress=told.append)
    records = read(tmp_path / "out.jsonl")
    assert (summary.lines, summary.errors, summary.resumed, sum(told)) == (4, 2, 0, 4)
    assert ["error" in record for record in records] == [False, True, True, False]
    assert records[1]["error"].startswith("prompt 1 has")
    assert records[2] == {"index": 2, "id": "#2", "prompt": "", "error": lines[2].error}
    assert summary.tokens == 16


def test_an_interrupted_run_goes_on_where_it_stopped(demo: LanguageModel, tmp_path: Path) -> None:
    expected = decode_file(demo, prompts_file(tmp_path), tmp_path / "whole.jsonl", SAMPLED, 2)
    lines, digest = read_lines(tmp_path / "prompts.jsonl")
    output = tmp_path / "out.jsonl"

    def stops(batches: Sequence[Any], make_worker: Callable[[], Worker]) -> Iterator[Any]:
        yield from in_process(batches[:2], make_worker)
        raise KeyboardInterrupt

    results = PartialResults(output, SAMPLED, {"input": digest})
    with pytest.raises(KeyboardInterrupt):
        run_batch(work_of(demo, SAMPLED, results, 2), lines, results, mapper=stops, group_size=2)
    results.close()
    partial_file = tmp_path / "out.jsonl.partial.jsonl"
    assert not output.exists()
    with partial_file.open("ab") as file:
        file.write(b'{"index": 4, "te')  # the machine went down while it wrote
    results = PartialResults(output, SAMPLED, {"input": digest})
    asked: list[int] = []

    def rest(batches: Sequence[Any], make_worker: Callable[[], Worker]) -> Iterator[Any]:
        asked.extend(line.index for batch in batches for line in batch)
        yield from in_process(batches, make_worker)

    summary = run_batch(work_of(demo, SAMPLED, results, 2), lines, results, mapper=rest, group_size=2)
    assert (len(asked), summary.resumed, summary.lines) == (1, 4, 5)
    assert without_stats(read(output)) == without_stats(expected)
    assert summary.tokens == sum(len(record["token_ids"]) for record in expected)
    assert not partial_file.exists()


def test_a_batch_size_below_1_is_refused(demo: LanguageModel, tmp_path: Path) -> None:
    results = PartialResults(tmp_path / "out.jsonl", GREEDY, {})
    with pytest.raises(InvalidArgumentError, match="batch_size must be at least 1, got 0"):
        run_batch(work_of(demo, GREEDY, results, 0), [], results)
