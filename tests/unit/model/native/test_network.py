"""The compiled kernels against torch, and what they promise beyond: a row's result doesn't depend on its neighbours."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import layerskip
from layerskip.errors import InvalidArgumentError
from layerskip.model.native.library import GROUP, load_library
from layerskip.model.native.network import NativeLinear, NativeNetwork, interleave
from layerskip.model.torch.network import TorchNetwork

needs_library = pytest.mark.skipif(load_library() is None, reason="the compiled kernels weren't built")


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(weight: Tensor, storage: str) -> Tensor:
    """What a weight is after it was stored."""
    match storage:
        case "bfloat16":
            return weight.bfloat16().float()
        case "int8":
            step = weight.abs().amax(1, keepdim=True) / 127
            return (weight / step).round().clamp(-128, 127) * step
        case "int4":
            groups = weight.view(len(weight), -1, GROUP)
            step = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16().float()
            return ((groups / step).round().clamp(-8, 7) * step).view_as(weight)
        case _:
            return weight


@needs_library
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (48, 96), (70, 64), (333, 160)])
def test_products(storage: str, outputs: int, inputs: int, threads: int) -> None:
    weight, bias = random(outputs, inputs), random(outputs, seed=1)
    linear = NativeLinear(weight, bias=bias, storage=storage)
    plain = NativeLinear(weight, storage=storage)
    for rows in (1, 2, 3, 4, 5, 6, 7, 9, 13):
        x = random(rows, inputs, seed=rows)
        wanted = x @ rounded(weight, storage).t()
        torch.testing.assert_close(linear(x), wanted + bias, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(plain(x), wanted, rtol=1e-4, atol=1e-4)


@needs_library
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8", "int4"])
def test_a_row_does_not_depend_on_its_neighbours(storage: str) -> None:
    linear = NativeLinear(random(208, 96), storage=storage)
    x = random(17, 96, seed=1)
    alone = torch.cat([linear(row) for row in x.split(1)])
    for rows in (2, 3, 5, 6, 7, 17):
        assert torch.equal(linear(x[:rows]), alone[:rows])


@needs_library
def test_bfloat16_is_taken_where_it_loses_nothing() -> None:
    weight = random(32, 64)
    exact = NativeLinear(weight.bfloat16().float())
    assert exact.storage == "bfloat16"
    assert NativeLinear(weight).storage == "float32"
    assert exact.num_bytes == NativeLinear(weight).num_bytes / 2
    x = random(3, 64, seed=1)
    assert torch.equal(exact(x), NativeLinear(weight.bfloat16().float(), storage="float32")(x))


@needs_library
def test_bytes_of_quantized_weights() -> None:
    weight = random(256, 512)
    floats = NativeLinear(weight).num_bytes
    assert NativeLinear(weight, storage="int8").num_bytes < 0.26 * floats
    assert NativeLinear(weight, storage="int4").num_bytes < 0.15 * floats


def test_interleaving_fills_up_panels() -> None:
    bias = torch.arange(1, 41)
    mixed = interleave(bias)
    assert mixed.tolist() == [*range(1, 17), *range(21, 37), *range(17, 21), *[0] * 12, *range(37, 41), *[0] * 12]
    if load_library() is not None:
        weight, x = random(40, 32), random(3, 32, seed=1)
        product, rows = NativeLinear(*weight.chunk(2), bias=mixed), x @ weight.t() + bias
        out = torch.stack([product(row) for row in x.split(1)]).view(3, -1)
        assert out.shape == (3, 40)
        torch.testing.assert_close(out[:, :16], rows[:, :16])
        torch.testing.assert_close(out[:, 16:32], rows[:, 20:36])
        torch.testing.assert_close(out[:, 32:36], rows[:, 16:20])


@needs_library
def test_exits_and_blocks_give_the_same_bits(tiny_checkpoint: Callable[..., Path], threads: int) -> None:
    """Any way to cut a text into blocks and a network into exits gives the same hidden states and keys."""
    decoder = layerskip.load(str(tiny_checkpoint()), kernels="native").decoder
    assert isinstance(decoder._network, NativeNetwork)
    tokens = torch.randint(0, 96, (2, 100), generator=torch.Generator().manual_seed(1))

    def run(blocks: list[int], stops: list[int]) -> tuple[Tensor, Tensor]:
        cache, parts, at = decoder.new_cache(2, 100), [], 0
        for size in blocks:
            positions = decoder.place(cache, [at, at], size)
            hidden = decoder.embed(tokens[:, at : at + size])
            for start, stop in zip([0, *stops], [*stops, 4], strict=True):
                hidden = decoder.run_layers(hidden, positions, cache, start, stop)
            parts.append(hidden)
            at += size
        return torch.cat(parts, 1), cache.keys

    whole, keys = run([100], [])
    for blocks, stops in (([1] * 100, [2]), ([50, 1, 7, 42], [1, 3]), ([33, 67], [])):
        hidden, other_keys = run(blocks, stops)
        assert torch.equal(hidden, whole)
        assert torch.equal(other_keys, keys)


@needs_library
def test_threads_of_the_caller_take_turns(tiny_checkpoint: Callable[..., Path]) -> None:
    lm = layerskip.load(str(tiny_checkpoint()), kernels="native")
    wanted = lm.logits(list(range(20)))
    found: list[Tensor] = []

    def work() -> None:
        found.extend(lm.logits(list(range(20))) for _ in range(20))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 80
    assert all(torch.equal(logits, wanted) for logits in found)


@needs_library
def test_a_team_beside_busy_processes_computes_the_same(tiny_checkpoint: Callable[..., Path], threads: int) -> None:
    lm = layerskip.load(str(tiny_checkpoint()), kernels="native")
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "ignore_eos": True, "exit_layer": 1}
    wanted = lm.generate([[1, 2, 3]], **options)[0].token_ids
    neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        end = time.monotonic() + 1.5  # long enough for the team to get smaller, to grow and to get smaller again
        while time.monotonic() < end:
            assert lm.generate([[1, 2, 3]], **options)[0].token_ids == wanted
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()
    assert lm.generate([[1, 2, 3]], **options)[0].token_ids == wanted


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own(threads: int) -> None:
    linear, x = NativeLinear(random(64, 64)), random(2, 64)
    wanted = linear(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(linear(x), wanted) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(linear(x), wanted)


def test_which_kernels(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = str(tiny_checkpoint())
    assert isinstance(layerskip.load(folder, kernels="torch").decoder._network, TorchNetwork)
    automatic = layerskip.load(folder).decoder._network
    assert isinstance(automatic, TorchNetwork if load_library() is None else NativeNetwork)
    assert isinstance(layerskip.load(folder, dtype="bfloat16").decoder._network, TorchNetwork)


def test_kernels_that_cannot_run_it(tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(tiny_checkpoint())
    with pytest.raises(InvalidArgumentError, match=r"kernels 'fast' are not known; use auto, native or torch"):
        layerskip.load(folder, kernels="fast")
    with pytest.raises(InvalidArgumentError, match=r"in float32 on a CPU, not in torch.bfloat16 on cpu"):
        layerskip.load(folder, dtype="bfloat16", kernels="native")
    monkeypatch.setattr("layerskip.model.native.network.load_library", lambda: None)
    with pytest.raises(InvalidArgumentError, match="C\\+\\+ compiler"):
        layerskip.load(folder, kernels="native")
    assert isinstance(layerskip.load(folder).decoder._network, TorchNetwork)


@needs_library
def test_widths_that_do_not_fit(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = str(tiny_checkpoint(hidden_size=24, num_attention_heads=2, num_key_value_heads=2))
    with pytest.raises(InvalidArgumentError, match="heads of 12 channels"):
        layerskip.load(folder, kernels="native")
    assert isinstance(layerskip.load(folder).decoder._network, TorchNetwork)
