"""Set-up that all tests share."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from tiny import TINY_CONFIG, write_tiny

DEMO = Path(__file__).parents[1] / "src" / "layerskip" / "assets" / "demo"

WORDS = "the red fox runs over a lazy dog while rain falls on green hills".split()


def pytest_configure() -> None:
    """A shell's background jobs ignore Ctrl-C, and so would the processes that tests start and interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class TinyCheckpoint(Protocol):
    """Writes a small random checkpoint and returns its folder."""

    def __call__(
        self,
        model_type: str = "llama",
        *,
        seed: int = 0,
        dtype: str = "float32",
        max_shard_size: str | None = None,
        tokenizer: bool = False,
        **config: Any,
    ) -> Path: ...


@pytest.fixture(scope="session")
def demo_config() -> dict[str, Any]:
    """config.json of the embedded model."""
    config: dict[str, Any] = json.loads((DEMO / "config.json").read_text())
    return config


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, demo_config: dict[str, Any]) -> TinyCheckpoint:
    """A factory of small random checkpoints of any family, written by transformers, each in a folder of its own.

    Args of the factory:
        model_type: The family.
        seed: Seed of the weights.
        dtype: Dtype of the file.
        max_shard_size: Such as "40KB", for a checkpoint of several files.
        tokenizer: Also copy the demo's tokenizer; the vocabulary is as large as the demo's then.
        **config: Keys of config.json that differ from `TINY_CONFIG`.
    """

    def write(
        model_type: str = "llama",
        *,
        seed: int = 0,
        dtype: str = "float32",
        max_shard_size: str | None = None,
        tokenizer: bool = False,
        **config: Any,
    ) -> Path:
        vocabulary = {"vocab_size": demo_config["vocab_size"]} if tokenizer else {}
        folder = tmp_path_factory.mktemp(model_type)
        write_tiny(
            folder, model_type, seed=seed, dtype=dtype, max_shard_size=max_shard_size, **{**vocabulary, **config}
        )
        if tokenizer:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(DEMO / file, folder)
        return folder

    return write


@pytest.fixture(scope="session")
def load_static() -> Callable[..., Any]:
    """Loads a folder as a `LanguageModel` on the CPU whose greedy rounds are those that CUDA graphs capture.

    They run whole from the first on, or after `uses_before` rounds of the same shape.
    """

    def load(
        folder: Path,
        *,
        dtype: str = "float32",
        uses_before: int = 0,
        exit_adapters: Path | None = None,
        cache_dtype: str | None = None,
    ) -> Any:
        import torch

        from layerskip.checkpoint.checkpoint import open_checkpoint
        from layerskip.checkpoint.loading.network import load_decoder
        from layerskip.checkpoint.loading.placement import choose_context
        from layerskip.checkpoint.loading.plan import LoadingPlan
        from layerskip.language_model import LanguageModel

        checkpoint = open_checkpoint(str(folder))
        plan = LoadingPlan(
            dtype=getattr(torch, dtype),
            device=torch.device("cpu"),
            context=choose_context(checkpoint.config, None),
            rounds="graphs",
            uses_before=uses_before,
            cache_dtype=None if cache_dtype is None else getattr(torch, cache_dtype),
            adapters=checkpoint.find_exit_adapters(exit_adapters),
        )
        return LanguageModel(checkpoint, load_decoder(checkpoint.config, checkpoint.weights, plan))

    return load


class TrainingStart(Protocol):
    """Writes what a training run from scratch starts from; returns config.json and a folder of texts."""

    def __call__(self, *, texts: int = 8, lines: int = 30, **config: Any) -> tuple[Path, Path]: ...


@pytest.fixture(scope="session")
def training_start(tmp_path_factory: pytest.TempPathFactory) -> TrainingStart:
    """A factory of shapes and texts to train tiny models on.

    Args of the factory:
        texts: Number of files.
        lines: Lines of eight words in each.
        **config: Keys of config.json that differ from a Llama of `TINY_CONFIG`'s sizes and a vocabulary of 300.
    """

    def write(*, texts: int = 8, lines: int = 30, **config: Any) -> tuple[Path, Path]:
        folder, pick = tmp_path_factory.mktemp("start"), random.Random(0)
        sizes = {name: value for name, value in TINY_CONFIG.items() if value is not None}
        shape = {"model_type": "llama", **sizes, "vocab_size": 300, **config}
        (folder / "config.json").write_text(json.dumps(shape))
        (folder / "texts").mkdir()
        for i in range(texts):
            text = "\n".join(" ".join(pick.choices(WORDS, k=8)) for _ in range(lines))
            (folder / "texts" / f"{i}.txt").write_text(text)
        return folder / "config.json", folder / "texts"

    return write


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that the package keeps for later goes into the user's cache, or comes from there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAYERSKIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def single_thread() -> None:
    """One torch thread a process: parallel workers don't compete, and sums are the same with and without them."""
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device, unless they are tried on the CPU (`gpu/conftest.py`)."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items or os.environ.get("LAYERSKIP_TEST_DEVICE") == "cpu" or _has_cuda():
        return
    for item in gpu_items:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_cuda() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()
