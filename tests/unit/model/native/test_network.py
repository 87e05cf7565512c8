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
from layerskip.model.native.library import load_library
from layerskip.model.native.network import NativeNetwork
from layerskip.model.torch.network import TorchNetwork

needs_library = pytest.mark.skipif(load_library() is None, reason="the compiled kernels weren't built")


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize("family", ["llama", "olmo2", "granite", "mixtral", "qwen3_moe"])
def test_exits_and_blocks_give_the_same_bits(tiny_checkpoint: Callable[..., Path], threads: int, family: str) -> None:
    """Any way to cut a text into blocks and a network into exits gives the same hidden states and keys."""
    decoder = layerskip.load(str(tiny_checkpoint(family)), kernels="native").decoder
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


def test_which_kernels(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = str(tiny_checkpoint())
    assert isinstance(layerskip.load(folder, kernels="torch").decoder._network, TorchNetwork)
    automatic = layerskip.load(folder).decoder._network
    assert isinstance(automatic, TorchNetwork if load_library() is None else NativeNetwork)
    assert isinstance(layerskip.load(folder, dtype="bfloat16").decoder._network, TorchNetwork)


def test_kernels_that_cannot_run_it(tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(tiny_checkpoint())
    with pytest.raises(
        InvalidArgumentError, match=r"kernels 'fast' are not known; use auto, native, native:TARGET or torch"
    ):
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
