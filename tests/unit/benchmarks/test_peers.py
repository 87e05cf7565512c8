"""What benchmarks against other programs share: runs in turn, ratios within repetitions, texts compared; a file's
formats; the plain reading of memory."""

import json
import sys
from collections.abc import Iterator
from contextlib import closing
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import layerskip
from layerskip.errors import InvalidArgumentError

FOLDER = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    """Imports a script of the folder, as it is when run from there."""
    known, path = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(FOLDER))
    yield import_module
    sys.path[:] = path
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(FOLDER)):
            del sys.modules[name]


@pytest.fixture(scope="module")
def peers(benchmark: Any) -> ModuleType:
    return benchmark("peers")


def test_common_length(peers: ModuleType) -> None:
    assert peers.common_length([], [1]) == 0
    assert peers.common_length([1, 2, 3], [1, 2, 4, 5]) == 2
    assert peers.common_length([1, 2], [1, 2, 3]) == 2
    assert peers.common_length([5], [1]) == 0


def test_ratios_are_within_repetitions(peers: ModuleType) -> None:
    """A machine that becomes four times as fast in the middle changes no ratio."""
    speeds = {"theirs": [10.0, 40.0, 40.0], "ours": [20.0, 80.0, 100.0]}
    comparison = peers.Comparison(speeds=speeds, texts={"theirs": [[1]], "ours": [[1]]})
    ratio = comparison.ratio("ours", "theirs")
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, 2.5)
    assert comparison.ratio("theirs", "theirs").median == 1


def test_texts_are_compared_with_the_reference(peers: ModuleType) -> None:
    texts = {"theirs": [[1, 2, 3], [4, 5, 6], [7]], "ours": [[1, 2, 9], [4, 5, 6], [8]]}
    comparison = peers.Comparison(speeds={"theirs": [1.0], "ours": [3.0]}, texts=texts)
    assert comparison.same_texts("ours", "theirs") == 1
    assert comparison.common_tokens("ours", "theirs") == 2
    assert list(comparison.rows("theirs"))[1] == ("ours", "3.0", "3.0 - 3.0", "3.00", "3.00 - 3.00", "1 of 3", "2")
    record = json.loads(json.dumps(comparison.record("theirs")))
    assert record["ours"]["ratio"] == {"median": 3.0, "low": 3.0, "high": 3.0}
    assert record["theirs"]["same_texts"] == 3


def test_ways_take_turns(peers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way runs on every prompt, the order changes, and the first repetition only warms up."""
    monkeypatch.setattr(peers, "PAUSE", 0)
    order: list[tuple[str, int]] = []

    def way(name: str) -> Any:
        def run(prompt: list[int]) -> Any:
            order.append((name, prompt[0]))
            calls = sum(each[0] == name for each in order)
            return peers.Run(tokens=[*prompt, calls], work=6, seconds=100.0 if calls <= 2 else 2.0)

        return run

    comparison = peers.interleave({"a": way("a"), "b": way("b")}, [[1], [2]], repetitions=2)
    first, second = [("a", 1), ("b", 1), ("a", 2), ("b", 2)], [("b", 1), ("a", 1), ("b", 2), ("a", 2)]
    assert order == [*first, *second, *first]
    assert comparison.speeds == {"a": [3.0, 3.0], "b": [3.0, 3.0]}  # the slow first calls don't count
    assert comparison.texts["a"] == [[1, 1], [2, 2]]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        peers.interleave({"a": way("a")}, [[1]], repetitions=0)


def test_our_text_and_prompt(peers: ModuleType) -> None:
    lm = layerskip.load("demo", dtype="float32", device="cpu")
    prompt = lm.encode(["def add(a, b):"])[0]
    plain = peers.our_text(lm, 12, generation_strategy="autoregressive")(prompt)
    assert len(plain.tokens) == 12  # past the end of the text
    assert plain.work == 11
    whole = peers.our_text(lm, 12, with_prompt=True, generation_strategy="adaptive")(prompt)
    assert list(whole.tokens) == list(plain.tokens)
    assert whole.work == 12
    read = peers.our_prompt(lm)(prompt)
    assert list(read.tokens) == list(plain.tokens)[:1]
    assert read.work == len(prompt)
    assert min(plain.seconds, whole.seconds, read.seconds) > 0


def test_long_prompts(benchmark: Any) -> None:
    """All have the length asked for, each begins with another text; without a tokenizer they are random."""
    models = benchmark("models")
    lm = layerskip.load("demo", dtype="float32", device="cpu")
    prompts = models.long_prompts(lm, FOLDER / "prompts.jsonl", 3, 512)
    assert [len(prompt) for prompt in prompts] == [512] * 3
    texts = [json.loads(line)["prompt"] for line in (FOLDER / "prompts.jsonl").read_text().splitlines()]
    for prompt, text in zip(prompts, texts, strict=False):
        begin = lm.encode([text])[0][:20]
        assert prompt[: len(begin)] == begin
    (longest,) = models.long_prompts(lm, FOLDER / "prompts.jsonl", 1, 20_000)
    assert len(longest) == 20_000


def test_synthetic_models_are_made_once(benchmark: Any, tmp_path: Path) -> None:
    models = benchmark("models")
    folder = models.prepare("tiny", tmp_path, exit_layer=2, agreement=0.5)
    changed = (tmp_path / "model.safetensors").stat().st_mtime_ns
    assert models.prepare("tiny", tmp_path, exit_layer=2, agreement=0.5) == folder == str(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == changed


def test_formats_name_llama_cpps_mixtures(benchmark: Any, tmp_path: Path) -> None:
    formats = benchmark("gguf_formats")
    assert set(formats.FORMATS) == {"file", "f32", *formats.FILE_TYPES}
    whole = formats.write_format("demo", "f32", tmp_path, 2)
    first = formats.write_format("demo", "f32", tmp_path, 2, 4)
    assert [file.name for file in (whole, first)] == ["model-f32.gguf", "draft4-f32.gguf"]
    lm = layerskip.load(str(first), dtype="float32", device="cpu")
    assert lm.config.num_layers == 4
    marked = tmp_path / "model-q8_0.gguf"
    marked.write_bytes(b"kept")  # what is there is taken as it is
    assert formats.write_format("demo", "q8_0", tmp_path, 2) == marked
    assert marked.read_bytes() == b"kept"


def test_missing_packages_are_named(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(SystemExit, match="pip install llama-cpp-python"):
        benchmark("gguf_formats").quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", "q8_0", 1)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(SystemExit, match="pip install openvino-genai"):
        benchmark("vs_openvino").describe_openvino()


def test_reader_reads_all_memory(benchmark: Any) -> None:
    reader = benchmark("roofline").Reader(2)
    reader()
    reader._memory[-1] = 0
    with pytest.raises(RuntimeError, match="has a zero"):
        reader()


def test_roofline_has_a_plain_reading(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    roofline = benchmark("roofline")
    monkeypatch.setattr(roofline, "OUTPUTS", 64)
    found = roofline.Roofline(torch.device("cpu"), torch.float32).gigabytes_per_second()
    assert roofline.READING in found
    assert all(rate > 0 for rate in found.values())


def test_unknown_options_are_refused_at_once(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the package's own errors."""
    roofline = benchmark("roofline")
    monkeypatch.setattr(roofline, "OUTPUTS", 64)
    with pytest.raises(InvalidArgumentError, match="compute 'int3' is not known"):
        roofline.main(roofline.Arguments(model="demo", compute=("int3",)))
    with pytest.raises(InvalidArgumentError, match="unknown option 'cash'"):
        roofline.main(roofline.Arguments(model="demo", formats=("file",), load={"cash": "1"}))


def test_compute_that_no_format_allows(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    roofline = benchmark("roofline")
    monkeypatch.setattr(roofline, "OUTPUTS", 64)
    with pytest.raises(InvalidArgumentError, match="no format can be computed in int8"):
        roofline.main(roofline.Arguments(model="demo", formats=("file",), compute=("int8",)))
    assert "left out: compute 'int8' needs weights in 8 or 4 bits" in capsys.readouterr().out


def test_their_prompt_gives_the_first_token_of_their_text(benchmark: Any) -> None:
    versus = benchmark("vs_transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=1, **sizes)).eval()
    prompt = [3, 1, 4, 1, 5]
    text = versus.their_text(model, 6)(prompt)
    assert (len(text.tokens), text.work) == (6, 6)
    read = versus.their_prompt(model)(prompt)
    assert (list(read.tokens), read.work) == (list(text.tokens)[:1], len(prompt))


def test_llama_cpps_drafts_leave_its_text_as_it_is(benchmark: Any, tmp_path: Path) -> None:
    """Both kinds of drafts, and a model that drafts for itself, all of whose drafts are accepted."""
    pytest.importorskip("llama_cpp")
    formats, llama = benchmark("gguf_formats"), benchmark("llama_cpp_model")
    whole, first = (formats.write_format("demo", "f32", tmp_path, 1, exit_layer) for exit_layer in (None, 4))
    prompt = layerskip.load("demo", device="cpu").encode(["def add(a, b):"])[0]
    with closing(llama.LlamaCpp(whole, 256, 1, exact=True)) as model:
        text, _ = model.write(prompt, 33)
        assert model.read(prompt)[1] == text[0]
        for drafting in (whole, first):
            with closing(llama.LlamaCpp(drafting, 256, 1, exact=True)) as other:
                found, _, rounds = model.write_with(llama.ModelDrafts(other), prompt, 33, 3)
            assert found == text
            assert rounds == 8 if drafting == whole else 8 < rounds <= 32
        found, _, _ = model.write_with(llama.PhraseDrafts(4), prompt, 33, 4)
        assert found == text
        assert model.write_with(llama.PhraseDrafts(4), prompt, 1, 4)[0] == text[:1]
    build = llama.describe_build()
    assert build["system"].startswith("CPU")
    quantized = formats.write_format("demo", "q8_0", tmp_path, 1)
    assert layerskip.load(str(quantized), device="cpu", compute="int8").decoder.compute == "int8"
