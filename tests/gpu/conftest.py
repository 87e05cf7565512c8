"""Where the tests of this folder run: on CUDA, or to try them without it, on the CPU (LAYERSKIP_TEST_DEVICE=cpu)."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import layerskip
from layerskip.language_model import LanguageModel


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests last: on a GPU that is lent for minutes, the others should have run by then."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(scope="session")
def device() -> str:
    """The device under test."""
    return os.environ.get("LAYERSKIP_TEST_DEVICE", "cuda")


@pytest.fixture(scope="session")
def load_here(device: str, load_static: Callable[..., LanguageModel]) -> Callable[..., LanguageModel]:
    """`layerskip.load` for the device. Where a GPU captures rounds, a CPU runs the function that would be captured."""

    def load(folder: Path, *, compile: str = "auto", **options: Any) -> LanguageModel:
        if device == "cpu" and compile == "auto":
            return load_static(
                folder,
                dtype=options.get("dtype", "float32"),
                uses_before=3,
                exit_adapters=options.get("exit_adapters"),
            )
        return layerskip.load(str(folder), device=device, kernels="torch", compile=compile, **options)  # type: ignore[arg-type]

    return load


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """Without TF32, which rounds the factors of float32 products to 10 bits."""
    import torch

    before = torch.backends.cuda.matmul.allow_tf32  # torch makes it up when asked, so that monkeypatch can't undo it
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
