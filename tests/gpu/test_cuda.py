"""The same guarantees on a CUDA device. Skipped where there is none."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import layerskip
from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.noise import Purpose, gumbel, make_key
from layerskip.evaluation.lossless import verify_lossless

pytestmark = pytest.mark.gpu

PROMPTS = [[5, 9, 11, 40], [7, 8], [3, 4, 5, 6, 7, 8, 9]]


@pytest.fixture
def full_precision() -> Iterator[None]:
    """Without TF32, which rounds float32 products to 10 bits."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3"])
def test_logits_are_those_of_the_cpu(tiny_checkpoint: Any, family: str) -> None:
    folder = str(tiny_checkpoint(family))
    on_cpu = layerskip.load(folder, dtype="float32", device="cpu").logits(PROMPTS[2])
    on_gpu = layerskip.load(folder, dtype="float32", device="cuda").logits(PROMPTS[2])
    assert (on_cpu - on_gpu.cpu()).abs().max() <= 1e-4


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_speculation_loses_nothing(tiny_checkpoint: Any, dtype: str) -> None:
    lm = layerskip.load(str(tiny_checkpoint()), dtype=dtype, device="cuda")
    config = GenerationConfig(max_new_tokens=24, temperature=0.8, top_p=0.95, seed=1)
    report = verify_lossless(lm, PROMPTS, [(e, k) for e in (1, 2, 4) for k in (1, 4)], config=config, batch_size=3)
    assert report.errors == 0


def test_noise_is_that_of_the_cpu() -> None:
    keys = [[make_key(1, Purpose.TARGET, position) for position in range(5)]]
    on_cpu, on_gpu = gumbel(keys, 1000, torch.device("cpu")), gumbel(keys, 1000, torch.device("cuda"))
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-5, atol=1e-5)


def test_auto_takes_the_gpu_and_the_checkpoints_dtype(tiny_checkpoint: Any) -> None:
    lm = layerskip.load(str(tiny_checkpoint(dtype="bfloat16")))
    assert lm.decoder.device.type == "cuda"
    assert lm.decoder.dtype == torch.bfloat16
    stats = lm.generate([PROMPTS[0]], max_new_tokens=16, exit_layer=2)[0].stats
    assert stats.seconds_drafting > 0
    assert stats.seconds_verifying > 0


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("compile", ["auto", pytest.param("max", marks=pytest.mark.slow)])
def test_captured_rounds_write_the_same_text(tiny_checkpoint: Any, family: str, compile: str) -> None:
    """Ragged rows that end at different times; each call again, so that graphs serve buffers of an earlier text."""
    folder = str(tiny_checkpoint(family))
    lm = layerskip.load(folder, dtype="float32", device="cuda", compile=compile)
    plain = layerskip.load(folder, dtype="float32", device="cuda", compile="off")
    for drafting in ({"generation_strategy": "autoregressive"}, {"exit_layer": 2, "num_speculations": 3}):
        options: dict[str, Any] = {"max_new_tokens": 60, "do_sample": False, "ignore_eos": True, **drafting}
        for prompts in (PROMPTS, PROMPTS, PROMPTS[:1]):
            expected = plain.generate(prompts, **options)
            found = lm.generate(prompts, **options)
            assert [x.token_ids for x in found] == [x.token_ids for x in expected]
    assert not any(x.problem for x in lm.decoder.compiled)
    assert {(x.shape.exit_layer, x.shape.num_drafts) for x in lm.decoder.compiled} == {(0, 0), (2, 3)}
    made = [(x.shape, x.seconds > 0) for x in lm.decoder.compiled]
    assert len(made) == len(set(made)), "a shape was captured twice: buffers weren't reused"
    assert plain.decoder.compiled == ()


def test_a_replayed_round_is_the_uncaptured_one(tiny_checkpoint: Any) -> None:
    """Bit for bit: a graph replays the kernels of the same function."""
    lm = layerskip.load(str(tiny_checkpoint()), dtype="float32", device="cuda")
    cache = lm.decoder.new_cache(3, 40)
    found = [lm.decoder.round_greedy([5, 6, 7], cache, 2, 3) for _ in range(6)]
    assert [x is None for x in found] == [True] * 3 + [False] * 3
    (program,) = lm.decoder._rounds._programs.values()  # type: ignore[union-attr]
    with torch.inference_mode():
        again = program._function(program._inputs)[:3].cpu()
    for round_ in found[3:]:
        assert round_ is not None
        assert torch.equal(torch.cat((round_.drafts, round_.targets), 1), again)
