from collections.abc import Iterator

import pytest
from servers import Served, serving

from layerskip import LanguageModel, load

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
