"""Batches of lines: reading them, decoding them, and keeping what is finished."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from layerskip import load
from layerskip.batch.lines import Line, LineDecoder, line_seed, map_here, read_lines, run_batch
from layerskip.batch.results import PartialResults, Record
from layerskip.decoding.config import GenerationConfig
from layerskip.errors import InvalidArgumentError, OutOfMemoryError, TokenizerError
from layerskip.language_model import LanguageModel

GREEDY = GenerationConfig(max_new_tokens=8)
SAMPLED = GenerationConfig(max_new_tokens=8, temperature=0.9, seed=5)
PROMPTS = ["def add(a, b):", "import os\n", "class Reader:\n    def read(self, path):", "x = 1", "for line in file:"]


@pytest.fixture(scope="module")
def demo() -> LanguageModel:
    return load("demo")


def write(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def prompts_file(folder: Path, prompts: Sequence[str] = PROMPTS) -> Path:
    return write(folder / "prompts.jsonl", [{"prompt": prompt, "id": f"#{i}"} for i, prompt in enumerate(prompts)])


def decode_file(lm: LanguageModel, file: Path, output: Path, config: GenerationConfig, batch_size: int) -> list[Record]:
    lines, digest = read_lines(file)
    results = PartialResults(output, config, {"input": digest})
    run_batch(lines, results, partial(map_here, LineDecoder(lm, config, results.seed)), batch_size=batch_size)
    return read(output)


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def without_stats(records: Sequence[Record]) -> list[Record]:
    return [{key: value for key, value in record.items() if key != "stats"} for record in records]


def test_lines_have_their_place_and_their_id(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    text = "a\u2028b"  # a line end to some, and none in JSON lines
    file.write_text(f'\ufeff{{"text": "{text}", "id": [1]}}\r\n\n   \n{{"text": "c", "other": 2}}', encoding="utf-8")
    lines, digest = read_lines(file, "text")
    assert [line.fields for line in lines] == [{"index": 0, "id": [1], "prompt": text}, {"index": 1, "prompt": "c"}]
    assert [line.error for line in lines] == [None, None]
    file.write_text('{"text": "d"}')
    assert read_lines(file, "text")[1] != digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ('"abc"', "must be a JSON object, got a str"),
        ('{"text": "abc"}', "has no field 'prompt'; it has 'text'"),
        ('{"prompt": 3}', "got a int"),
        ('{"prompt": ["a"]}', "got a list"),
        ('{"prompt": [{"role": "user"}]}', "got a list"),
        ('{"prompt": ""}', "is empty"),
        ('{"prompt": []}', "is empty"),
        ('{"prompt": "\\ud83d"}', "spells half a character"),
    ],
)
def test_a_bad_line_says_what_is_wrong_and_the_others_stay(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(f'{{"prompt": "good"}}\n{text}\n')
    good, bad = read_lines(file)[0]
    assert good.error is None
    assert bad.error is not None
    assert bad.error.startswith("prompt 1 ")
    assert message in bad.error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n \n", "has no lines"),
        (b"\xff", "is not UTF-8"),
        (b'{"text": "a"}\n{"text": "b"}', "name the prompt's field"),
    ],
)
def test_a_file_without_prompts_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_bytes(content)
    with pytest.raises(InvalidArgumentError, match=message):
        read_lines(file)
    with pytest.raises(InvalidArgumentError, match="can't be read"):
        read_lines(tmp_path / "missing.jsonl")


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


def test_line_seeds_are_seeds_and_differ() -> None:
    seeds = [line_seed(seed, index) for seed in (0, 1, 2**63 - 1) for index in range(1000)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_line_that_cannot_be_decoded_does_not_stop_the_others(demo: LanguageModel, tmp_path: Path) -> None:
    file = prompts_file(tmp_path, ["def f():", "x = 1\n" * 2000, "", "import os"])
    lines, _ = read_lines(file)
    results = PartialResults(tmp_path / "out.jsonl", GREEDY, {})
    told: list[int] = []
    mapper = partial(map_here, LineDecoder(demo, GREEDY, 0))
    summary = run_batch(lines, results, mapper, batch_size=4, on_progress=told.append)
    records = read(tmp_path / "out.jsonl")
    assert (summary.lines, summary.errors, summary.resumed, sum(told)) == (4, 2, 0, 4)
    assert ["error" in record for record in records] == [False, True, True, False]
    assert records[1]["error"].startswith("prompt 1 has")
    assert records[2] == {"index": 2, "id": "#2", "prompt": "", "error": lines[2].error}
    assert summary.tokens == 16


def test_messages_go_through_the_chat_template(demo: LanguageModel, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "add"}]
    file = write(tmp_path / "in.jsonl", [{"messages": messages}, {"messages": [{"role": "odd", "content": "x"}]}])
    lines, _ = read_lines(file, "messages")
    lm = load("demo")
    decoder = LineDecoder(lm, GREEDY, 0)
    lm.tokenizer.chat_template = None
    with pytest.raises(TokenizerError, match="no chat template"):
        decoder(lines)
    lm.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'odd' %}{{ raise_exception('no such role') }}{% endif %}"
        "# {{ m.content }}\n{% endfor %}def"
    )
    good, bad = decoder(lines)
    assert good["token_ids"] == demo.generate(["# add\ndef"], GREEDY)[0].token_ids
    assert good["prompt"] == messages
    assert "no such role" in bad["error"]


def test_a_batch_that_does_not_fit_is_halved(
    demo: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GenerationConfig(max_new_tokens=8, exit_layer=4)  # adaptive decoding measures with caches of its own
    expected = decode_file(demo, prompts_file(tmp_path), tmp_path / "all.jsonl", config, 1)
    new_cache, sizes = demo.decoder.new_cache, []

    def small(batch_size: int, capacity: int) -> Any:
        sizes.append(batch_size)
        if batch_size > 1 or capacity > 16:
            raise OutOfMemoryError("no room")
        return new_cache(batch_size, capacity)

    monkeypatch.setattr(demo.decoder, "new_cache", small)
    records = decode_file(demo, prompts_file(tmp_path), tmp_path / "small.jsonl", config, 4)
    assert sizes[0] == 4
    for record, whole in zip(records, expected, strict=True):
        fits = whole["stats"]["prompt_tokens"] + 8 <= 16
        assert record.get("token_ids") == (whole["token_ids"] if fits else None)
        assert record.get("error") == (None if fits else "no room")
    assert {"error" in record for record in records} == {True, False}


def test_an_interrupted_run_goes_on_where_it_stopped(demo: LanguageModel, tmp_path: Path) -> None:
    expected = decode_file(demo, prompts_file(tmp_path), tmp_path / "whole.jsonl", SAMPLED, 2)
    lines, digest = read_lines(tmp_path / "prompts.jsonl")
    output = tmp_path / "out.jsonl"

    def stops(batches: Sequence[Sequence[Line]]) -> Iterator[tuple[int, list[Record]]]:
        yield from list(map_here(LineDecoder(demo, SAMPLED, 5), batches[:2]))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_batch(lines, PartialResults(output, SAMPLED, {"input": digest}), stops, batch_size=2)
    partial_file = tmp_path / "out.jsonl.partial.jsonl"
    assert not output.exists()
    with partial_file.open("ab") as file:
        file.write(b'{"index": 4, "te')  # the machine went down while it wrote
    results = PartialResults(output, SAMPLED, {"input": digest})
    asked: list[int] = []

    def rest(batches: Sequence[Sequence[Line]]) -> Iterator[tuple[int, list[Record]]]:
        asked.extend(line.index for batch in batches for line in batch)
        yield from map_here(LineDecoder(demo, SAMPLED, results.seed), batches)

    summary = run_batch(lines, results, rest, batch_size=2)
    assert (len(asked), summary.resumed, summary.lines) == (1, 4, 5)
    assert without_stats(read(output)) == without_stats(expected)
    assert summary.tokens == sum(len(record["token_ids"]) for record in expected)
    assert not partial_file.exists()


def test_results_of_another_configuration_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    PartialResults(output, GREEDY, {"input": "a", "top_k": 0}).add([{"index": 0, "text": "x"}])
    with pytest.raises(InvalidArgumentError, match=r"another configuration \(input 'a', not 'b'\)"):
        PartialResults(output, GREEDY, {"input": "b", "top_k": 0})
    assert list(PartialResults(output, GREEDY, {"input": "a", "top_k": 0}).offsets) == [0]
    partial_file = tmp_path / "out.jsonl.partial.jsonl"
    partial_file.write_text("my notes\n")
    with pytest.raises(InvalidArgumentError, match="no run of layerskip batch"):
        PartialResults(output, GREEDY, {})
    assert partial_file.read_text() == "my notes\n"


def test_a_finished_output_is_not_overwritten(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out.jsonl"
    PartialResults(output, GREEDY, {}).finish()
    with pytest.raises(InvalidArgumentError, match="exists already"):
        PartialResults(output, GREEDY, {})
    output.unlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgumentError, match="can't be written"):
        PartialResults(tmp_path / "file" / "out.jsonl", GREEDY, {})


def test_a_drawn_seed_is_kept(tmp_path: Path) -> None:
    config = GenerationConfig(temperature=0.5)
    seeds = {PartialResults(tmp_path / "a.jsonl", config, {}).seed for _ in range(3)}
    assert len(seeds) == 1
    assert PartialResults(tmp_path / "b.jsonl", config, {}).seed not in seeds
    assert PartialResults(tmp_path / "c.jsonl", GREEDY, {}).seed == 0


def test_what_all_lines_share_is_checked_at_the_start(demo: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="exit"):
        LineDecoder(demo, GenerationConfig(exit_layer=99), 0)
    results = PartialResults(tmp_path / "out.jsonl", GREEDY, {})
    with pytest.raises(InvalidArgumentError, match="batch_size must be at least 1, got 0"):
        run_batch([], results, lambda batches: iter(()), batch_size=0)
