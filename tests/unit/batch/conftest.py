"""A model for batches, which reads texts."""

import pytest

from layerskip import load
from layerskip.language_model import LanguageModel


@pytest.fixture(scope="package")
def demo() -> LanguageModel:
    return load("demo")
