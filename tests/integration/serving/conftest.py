from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache

import pytest
from chat_templates import tokenizer_with
from openai import OpenAI
from servers import Served, app_at_port, serving
from tiny import write_tiny

from layerskip import LanguageModel, load
from layerskip.checkpoint.names import is_installed

pytest.importorskip("fastapi")
pytest.importorskip("openai")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The embedded model, served."""
    with serving(tmp_path_factory.mktemp("demo"), "demo") as server:
        yield server


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    """The same model without a server."""
    return load("demo")


Chats = Callable[..., OpenAI]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chats]:
    """Makes clients of tiny random models that have a chat template."""
    with ExitStack() as stack:

        @cache
        def make(template: str, special: tuple[str, ...] = ()) -> OpenAI:
            folder = tmp_path_factory.mktemp("chat")
            tokenizer = tokenizer_with(template, special)
            write_tiny(folder, vocab_size=len(tokenizer), max_position_embeddings=4096, eos_token_id=2)
            tokenizer.save_pretrained(folder)
            address = stack.enter_context(app_at_port(load(str(folder)), max_concurrency=8, max_model_len=4096))
            return OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

        yield make


@pytest.fixture(scope="module")
def smollm2() -> Iterator[OpenAI]:
    """A client of a small model that was trained for conversations."""
    if not is_installed("smollm2"):
        pytest.skip("smollm2 isn't installed")
    with app_at_port(load("smollm2"), max_concurrency=8, max_model_len=2048, cache_memory=2) as address:
        yield OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
