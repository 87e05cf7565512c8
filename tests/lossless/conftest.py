"""Tiny random networks, and the slow decoder that everything is held against."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import drain, start
from layers import Entry, entries_of
from tiny import write_agreeing

import layerskip
from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.event import Event
from layerskip.decoding.sampler import Sampler
from layerskip.language_model import LanguageModel
from layerskip.model.native.library import load_library


@pytest.fixture(scope="session")
def make_lm(
    tmp_path_factory: pytest.TempPathFactory, load_static: Callable[[Path], LanguageModel]
) -> Callable[..., LanguageModel]:
    """Makes a random Llama (`tiny.write_agreeing`), computed by `native` or `torch` kernels or in `static` rounds."""

    def make(*, kernels: str = "torch", **sizes: Any) -> LanguageModel:
        folder: Path = tmp_path_factory.mktemp("tiny")
        write_agreeing(folder, **sizes)
        if kernels == "static":
            return load_static(folder)
        return layerskip.load(str(folder), dtype="float32", device="cpu", kernels=kernels)

    return make


@pytest.fixture(scope="session", params=["torch", "native", "static"])
def lm(make_lm: Callable[..., LanguageModel], request: pytest.FixtureRequest) -> LanguageModel:
    """The network of most tests: 5 layers, 48 tokens, a context of 96; by either kind of kernels, in whole rounds."""
    if request.param == "native" and load_library() is None:
        pytest.skip("the compiled kernels weren't built")
    return make_lm(kernels=request.param)


@pytest.fixture(scope="session")
def lm_folder(make_lm: Callable[..., LanguageModel]) -> Path:
    """The checkpoint of the network of most tests."""
    folder = make_lm().checkpoint.hugging_face_folder
    assert folder is not None
    return folder


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Prompts of different lengths, one of a single token."""
    return [[7], [3, 1, 4, 1, 5, 9, 2, 6], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25]]


@pytest.fixture(scope="session")
def slow_decode() -> Callable[..., list[int]]:
    """Autoregressive decoding without a cache: reads the whole text again for each token."""

    def run(lm: LanguageModel, prompt: list[int], **options: Any) -> list[int]:
        config = GenerationConfig(**options)
        sampler = Sampler([config], [config.seed or 0], prompt_lengths=[len(prompt)])
        tokens = list(prompt)
        for _ in range(config.max_new_tokens):
            logits = lm.logits(tokens, config.exit_layer)[None, -1:]
            scores = sampler.scores(logits, [[tokens]])
            tokens.append(int(sampler.choose(scores, [len(tokens)])))
            if tokens[-1] in (config.eos_token_ids or ()) and not config.ignore_eos:
                break
        return tokens[len(prompt) :]

    return run


@pytest.fixture(scope="session")
def rounds_of() -> Callable[..., list[Event]]:
    """What each round gives a single row, the prompt's first token left out."""

    def run(lm: LanguageModel, prompt: list[int], **options: Any) -> list[Event]:
        return drain(start(lm.decoder, [prompt], **options))[1:]

    return run


@pytest.fixture
def layer_log(lm: LanguageModel) -> Iterator[list[Entry]]:
    """Every entry into a layer of `lm` as it happens, drafting included."""
    log: list[Entry] = []
    lm.decoder.calls.observer = entries_of(log)
    yield log
    lm.decoder.calls.observer = None
