"""Threads of torch while rounds of native kernels run."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import layerskip
from layerskip.language_model import LanguageModel
from layerskip.model.native.library import load_library
from layerskip.model.native.threads import kernel_threads, torch_at_rest

pytestmark = pytest.mark.skipif(load_library() is None, reason="the compiled kernels weren't built")


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_kernels_keep_their_threads() -> None:
    assert kernel_threads() == 3
    with torch_at_rest():
        assert (torch.get_num_threads(), kernel_threads()) == (1, 3)
        with torch_at_rest():
            assert (torch.get_num_threads(), kernel_threads()) == (1, 3)
        assert (torch.get_num_threads(), kernel_threads()) == (1, 3)
    assert (torch.get_num_threads(), kernel_threads()) == (3, 3)


def test_threads_come_back_after_an_error() -> None:
    with pytest.raises(RuntimeError), torch_at_rest():
        raise RuntimeError
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(("kernels", "during"), [("native", 1), ("torch", 3)])
def test_torch_rests_while_native_rounds_run(tiny_checkpoint: Callable[..., Path], kernels: str, during: int) -> None:
    lm = layerskip.load(str(tiny_checkpoint()), device="cpu", dtype="float32", kernels=kernels)  # type: ignore[arg-type]
    seen = set[int]()
    lm.decoder.calls.observer = lambda *_: seen.add(torch.get_num_threads())
    for _ in lm.stream([5, 6, 7], max_new_tokens=8):
        assert torch.get_num_threads() == 3  # between rounds it is the caller's turn
    assert seen == {during}


def test_a_new_cache_wakes_nobody(text_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, zeros = [], torch.zeros

    def observed(*args: Any, **options: Any) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return zeros(*args, **options)

    monkeypatch.setattr(torch, "zeros", observed)
    assert text_lm.decoder.kernels == "native"
    text_lm.decoder.new_cache(1, 16)
    assert seen == [1, 1]
