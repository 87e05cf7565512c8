"""The same guarantees on a CUDA device. Skipped where there is none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from offloading import size_for

import layerskip
from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.engine import Engine
from layerskip.decoding.request import make_request
from layerskip.decoding.rounds.acceptance import accept_block, accept_rejection
from layerskip.evaluation.verify.compare import make_plan
from layerskip.evaluation.verify.run import verify
from layerskip.language_model import LanguageModel
from layerskip.machine import free_memory
from layerskip.model.cache import KVCache
from layerskip.model.choosing.noise import Purpose, gumbel, make_key, uniforms
from layerskip.model.config.families import FAMILIES
from layerskip.model.decoders.graphs import GraphDecoder
from layerskip.model.drafts import DraftRequest
from layerskip.model.torch.offload import OffloadedLayers

pytestmark = pytest.mark.gpu

PROMPTS = [[5, 9, 11, 40], [7, 8], [3, 4, 5, 6, 7, 8, 9]]
LONG = [[(7 * i) % 96 for i in range(n)] for n in (90, 3, 61)]
"""Rows of very different lengths, which end in the context's last slots."""

Load = Callable[..., LanguageModel]


def tokens_of(
    lm: LanguageModel, tokens: list[int], cache: KVCache, exit_layer: int, num_drafts: int
) -> list[list[int]]:
    """Drafts and targets of a round in each row."""
    request = DraftRequest(exit_layer=exit_layer, num_drafts=num_drafts)
    round_ = lm.decoder.round(tokens, cache, request, lm.decoder.num_layers)
    return [drafts + targets for drafts, targets in zip(round_.drafts, round_.targets, strict=True)]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logits_are_those_of_the_cpu(tiny_checkpoint: Any, load_here: Load, family: str) -> None:
    folder = tiny_checkpoint(family)
    on_cpu = layerskip.load(str(folder), dtype="float32", device="cpu").logits(LONG[0])
    here = load_here(folder, dtype="float32").logits(LONG[0])
    assert (on_cpu - here.cpu()).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "granite"])
def test_16_bit_logits_are_close(tiny_checkpoint: Any, load_here: Load, family: str, dtype: str) -> None:
    folder = tiny_checkpoint(family)
    exact = layerskip.load(str(folder), dtype="float32", device="cpu").logits(LONG[0])
    here = load_here(folder, dtype=dtype).logits(LONG[0])
    assert here.dtype == torch.float32
    assert (here.cpu() - exact).norm() / exact.norm() < 6e-2


@pytest.mark.parametrize("compile", ["auto", "off"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_speculation_loses_nothing(tiny_checkpoint: Any, load_here: Load, dtype: str, compile: str) -> None:
    lm = load_here(tiny_checkpoint(), dtype=dtype, compile=compile)
    config = GenerationConfig(max_new_tokens=24, temperature=0.8, top_p=0.95, top_k=50, min_p=0.01, seed=1)
    plan = make_plan(lm, [(e, k) for e in (1, 2, 4) for k in (1, 4)], config=config, batch_size=3)
    assert verify(lm, PROMPTS, plan).errors == 0


def test_rows_that_fill_the_context(tiny_checkpoint: Any, load_here: Load) -> None:
    """Drafts beyond a row's end go to the scratch slot, in captured rounds and in others."""
    folder = tiny_checkpoint("gemma3_text")
    options: dict[str, Any] = {"max_new_tokens": 200, "do_sample": False, "ignore_eos": True}
    off = load_here(folder, dtype="float32", compile="off")
    expected = [x.token_ids for x in off.generate(LONG, generation_strategy="autoregressive", **options)]
    assert [len(text) for text in expected] == [38, 125, 67]
    for lm in (off, load_here(folder, dtype="float32")):
        for _ in range(2):  # buffers and graphs of the first call serve the second
            found = lm.generate(LONG, exit_layer=2, num_speculations=5, **options)
            assert [x.token_ids for x in found] == expected


@pytest.mark.parametrize("strategy", ["adaptive", "ngram"])
@pytest.mark.parametrize("samples", [False, True])
def test_other_strategies_write_the_same_text(
    tiny_checkpoint: Any, load_here: Load, strategy: str, samples: bool
) -> None:
    lm = load_here(tiny_checkpoint(), dtype="float32")
    options: dict[str, Any] = {"max_new_tokens": 60, "do_sample": samples, "seed": 3, "ignore_eos": True}
    expected = lm.generate(PROMPTS, generation_strategy="autoregressive", **options)
    for _ in range(2):
        found = lm.generate(PROMPTS, generation_strategy=strategy, **options)
        assert [x.token_ids for x in found] == [x.token_ids for x in expected]


@pytest.mark.parametrize(
    "options", [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"draft_vocabulary": 40}]
)
def test_texts_that_depend_on_more_than_logits(tiny_checkpoint: Any, load_here: Load, options: dict[str, Any]) -> None:
    loading = {name: options[name] for name in options if name == "draft_vocabulary"}
    lm = load_here(tiny_checkpoint(), dtype="float32", compile="off", **loading)
    decoding = {name: value for name, value in options.items() if name not in loading}
    decoding |= {"max_new_tokens": 24, "do_sample": True, "seed": 5, "ignore_eos": True}
    expected = lm.generate(PROMPTS, generation_strategy="autoregressive", **decoding)
    found = lm.generate(PROMPTS, exit_layer=2, num_speculations=3, **decoding)
    assert [x.token_ids for x in found] == [x.token_ids for x in expected]


@pytest.mark.parametrize("block", [False, True])
def test_rejection_sampling_runs(tiny_checkpoint: Any, load_here: Load, block: bool) -> None:
    lm = load_here(tiny_checkpoint(), dtype="float32")
    options: dict[str, Any] = {"acceptance": "rejection", "block_verification": block, "do_sample": True, "seed": 1}
    for strategy in ("self_speculative", "ngram"):
        found = lm.generate(PROMPTS, max_new_tokens=30, ignore_eos=True, generation_strategy=strategy, **options)
        again = lm.generate(PROMPTS, max_new_tokens=30, ignore_eos=True, generation_strategy=strategy, **options)
        assert [len(x.token_ids) for x in found] == [30, 30, 30]
        assert [x.token_ids for x in found] == [x.token_ids for x in again]


@pytest.mark.parametrize("accept", [accept_block, accept_rejection])
def test_acceptance_is_that_of_the_cpu(device: str, accept: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> None:
    generator = torch.Generator().manual_seed(0)
    target, draft = (torch.randn(8, n, 20, generator=generator).softmax(-1) for n in (5, 4))
    tokens = torch.randint(0, 20, (8, 4), generator=generator)
    keys = [[make_key(1, Purpose.ACCEPT, i, row) for i in range(4)] for row in range(8)]
    num_drafts = torch.tensor([4, 4, 3, 2, 1, 0, 4, 4])
    expected = accept(tokens, draft, target, uniforms(keys, torch.device("cpu")), num_drafts)
    inputs = (x.to(device) for x in (tokens, draft, target))
    found = accept(*inputs, uniforms(keys, torch.device(device)), num_drafts.to(device))
    assert found[0].tolist() == expected[0].tolist()
    torch.testing.assert_close(found[1].cpu(), expected[1])


def test_noise_is_that_of_the_cpu(device: str) -> None:
    keys = [[make_key(1, Purpose.TARGET, position) for position in range(5)]]
    on_cpu, here = (gumbel(keys, 128_256, torch.device(name)) for name in ("cpu", device))
    torch.testing.assert_close(here.cpu(), on_cpu, rtol=1e-5, atol=1e-5)


def test_scores_are_those_of_the_cpu(tiny_checkpoint: Any, load_here: Load) -> None:
    folder = tiny_checkpoint()
    texts = [[*text, 1] for text in LONG]
    on_cpu = layerskip.load(str(folder), dtype="float32", device="cpu").score(texts)
    here = load_here(folder, dtype="float32").score(texts)
    assert [x.logprob for x in here] == pytest.approx([x.logprob for x in on_cpu], rel=1e-5)


def test_sessions_and_shown_drafts(tiny_checkpoint: Any, load_here: Load) -> None:
    """A chat's cache outlives the call, beside captured rounds."""
    lm = load_here(tiny_checkpoint(), dtype="float32")
    session, text = lm.new_session(), [5, 9, 11]
    options: dict[str, Any] = {"max_new_tokens": 12, "exit_layer": 2, "num_speculations": 3, "ignore_eos": True}
    for show in (False, True, False):
        events = list(lm.stream([text], session=session, show_drafts=show, **options))
        (result,) = [event.result for event in events if isinstance(event, layerskip.FinishEvent)]
        assert result.token_ids == lm.generate([text], **options)[0].token_ids
        text = [*text, *result.token_ids, 6]


def test_auto_takes_the_gpu_and_the_checkpoints_dtype(tiny_checkpoint: Any, device: str) -> None:
    chosen = "auto" if device == "cuda" else device
    lm = layerskip.load(str(tiny_checkpoint(dtype="bfloat16")), device=chosen)
    assert lm.decoder.device.type == device
    assert lm.decoder.dtype == (torch.bfloat16 if device == "cuda" else torch.float32)
    stats = lm.generate([PROMPTS[0]], max_new_tokens=16, exit_layer=2)[0].stats
    assert stats.seconds_drafting > 0
    assert stats.seconds_verifying > 0


def test_memory_of_a_cache_that_is_gone_is_free_again(tiny_checkpoint: Any, load_here: Load, device: str) -> None:
    lm = load_here(tiny_checkpoint(max_position_embeddings=65_536), dtype="float32", compile="off")
    lm.decoder.new_cache(1, 10)
    before = free_memory(lm.decoder.device)
    size = lm.decoder.new_cache(1, 60_000).keys.nbytes
    after = free_memory(lm.decoder.device)
    assert before is not None
    assert after is not None
    if device == "cuda":  # a CPU's other processes come and go
        assert abs(before - after) < size


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "granite"])
@pytest.mark.parametrize("compile", ["auto", pytest.param("max", marks=pytest.mark.slow)])
def test_captured_rounds_write_the_same_text(
    tiny_checkpoint: Any, load_here: Load, device: str, family: str, compile: str
) -> None:
    """Ragged rows that end at different times; each call again, so that graphs serve buffers of an earlier text."""
    folder = tiny_checkpoint(family)
    lm = load_here(folder, dtype="float32", compile=compile)
    plain = load_here(folder, dtype="float32", compile="off")
    for drafting in ({"generation_strategy": "autoregressive"}, {"exit_layer": 2, "num_speculations": 3}):
        options: dict[str, Any] = {"max_new_tokens": 60, "do_sample": False, "ignore_eos": True, **drafting}
        for prompts in (PROMPTS, PROMPTS, PROMPTS[:1]):
            expected = plain.generate(prompts, **options)
            found = lm.generate(prompts, **options)
            assert [x.token_ids for x in found] == [x.token_ids for x in expected]
    assert not any(x.problem for x in lm.decoder.compiled)
    rounds = [x for x in lm.decoder.compiled if x.shape.kind == "round"]  # rows that end draft one by one
    assert {(x.shape.exit_layer, x.shape.num_drafts) for x in rounds} == {(0, 0), (2, 3)}
    made = [(x.shape, x.seconds > 0) for x in rounds]
    assert len(made) == len(set(made)), "a shape was captured twice: buffers weren't reused"
    assert not isinstance(plain.decoder, GraphDecoder)


def test_a_replayed_round_is_the_uncaptured_one(tiny_checkpoint: Any, load_here: Load) -> None:
    """Bit for bit: a graph replays the kernels of the same function."""
    lm = load_here(tiny_checkpoint(), dtype="float32")
    cache, made = lm.decoder.new_cache(3, 40), []
    for _ in range(6):
        found = tokens_of(lm, [5, 6, 7], cache, 2, 3)
        made.append(len(lm.decoder.compiled))
        if made[-1]:
            (program,) = lm.decoder._rounds._programs.values()
            with torch.inference_mode():
                assert program._function(program.inputs.tensor)[:3].tolist() == found
    assert made == [0] * 3 + [1] * 3


def test_graphs_of_several_shapes_share_their_memory(tiny_checkpoint: Any, load_here: Load) -> None:
    """Replayed in any order, and beside work outside of graphs, none disturbs another."""
    lm = load_here(tiny_checkpoint(), dtype="float32")
    cache = lm.decoder.new_cache(2, 100)
    shapes = [(0, 0), (2, 3), (1, 5), (2, 1)]
    expected = {}
    for exit_layer, num_drafts in shapes:
        for _ in range(5):
            expected[exit_layer, num_drafts] = tokens_of(lm, [5, 6], cache, exit_layer, num_drafts)
    assert [(x.shape.exit_layer, x.shape.num_drafts) for x in lm.decoder.compiled] == shapes
    for shape in (*shapes[::-1], *shapes, *shapes[1:]):
        lm.logits(PROMPTS[2])
        assert tokens_of(lm, [5, 6], cache, *shape) == expected[shape], shape


def test_graphs_of_rows_anywhere_in_a_cache(tiny_checkpoint: Any, load_here: Load) -> None:
    """Rounds of later rows: three are captured as four, whose last one may belong to a running row."""
    lm = load_here(tiny_checkpoint(), dtype="float32")
    whole, alone = lm.decoder.new_cache(6, 40), lm.decoder.new_cache(3, 40)
    whole.keys.normal_()
    whole.values.normal_()
    for row in range(6):
        whole.commit(row, 20 + row)
    for row in range(3):
        alone.keys[:, row], alone.values[:, row] = whole.keys[:, 1 + row], whole.values[:, 1 + row]
        alone.commit(row, 21 + row)
    neighbours = [whole.keys[:, row, :-1].clone() for row in (0, 4, 5)]
    for _ in range(5):
        found = tokens_of(lm, [5, 6, 7], whole.view(1, 4), 2, 3)
        assert found == tokens_of(lm, [5, 6, 7], alone, 2, 3)
    assert {x.shape.num_rows for x in lm.decoder.compiled} == {3, 4}
    for row, keys in zip((0, 4, 5), neighbours, strict=True):
        assert torch.equal(whole.keys[:, row, :-1], keys)


@pytest.mark.parametrize("samples", [False, True])
def test_requests_join_and_leave_beside_captured_rounds(tiny_checkpoint: Any, load_here: Load, samples: bool) -> None:
    lm = load_here(tiny_checkpoint(), dtype="float32")
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": samples, "ignore_eos": True}
    ways = [
        {"exit_layer": 2, "num_speculations": 3},
        {"generation_strategy": "autoregressive"},
        {"exit_layer": 1, "num_speculations": 2},
    ]
    engine, rows = Engine(lm.decoder, max_rows=6, capacity=60), []
    for number in range(6):
        config = GenerationConfig(**options, **ways[number % 3])
        rows.append(engine.add(make_request(lm.decoder, PROMPTS[number % 3], config, seed=number)))
        for _ in range(3):
            engine.step()
    while engine.rows:
        engine.step()
    for number, row in enumerate(rows):
        (expected,) = lm.generate([PROMPTS[number % 3]], seed=number, **options, **ways[number % 3])
        assert row.output == expected.token_ids


def test_layers_in_the_cpus_memory_give_the_same_text(tiny_checkpoint: Callable[..., Path], device: str) -> None:
    folder = tiny_checkpoint(hidden_size=64, intermediate_size=96, num_hidden_layers=8)
    whole, part = (
        layerskip.load(str(folder), device=device, kernels="torch", dtype="float32", compile="off", **options)
        for options in ({}, {"device_memory": size_for(folder, 3, device)})
    )
    assert isinstance(part.decoder._network.layers, OffloadedLayers)
    prompt = [list(range(3, 60))]
    for way in ({}, {"exit_layer": 2, "num_speculations": 3}):
        texts = [lm.generate(prompt, max_new_tokens=48, **way)[0].token_ids for lm in (whole, part)]
        assert texts[0] == texts[1]
