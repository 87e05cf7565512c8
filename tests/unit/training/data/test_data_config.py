"""DataConfig checks its fields, and needs nothing heavy."""

import subprocess
import sys
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from layerskip.errors import InvalidArgumentError
from layerskip.training.data.config import DataConfig


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("sequence_length", 1, "at least 2, got 1"),
        ("sequence_length", True, "got True"),
        ("sequence_length", 8.0, "got 8.0"),
        ("held_out", -0.1, "from 0 to 0.5, got -0.1"),
        ("held_out", 0.6, "got 0.6"),
        ("held_out", float("nan"), "got nan"),
        ("max_documents", 0, "at least 1, got 0"),
        ("eval_tokens", 0, "at least 1, got 0"),
        ("text_field", "", "name of a field"),
        ("streaming", "yes", "True or False, got 'yes'"),
        ("data", ("",), "aren't empty"),
        ("data", 3, "got 3"),
        ("suffixes", ("a/b",), r"\.py, got 'a/b'"),
        ("suffixes", (".",), "got '.'"),
    ],
)
def test_bad_values_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^{field} .*{message}"):
        DataConfig(**{field: value})


def test_lists_and_single_names_become_tuples() -> None:
    config = DataConfig(data="python-stdlib", suffixes=["py", ".MD", "*.rs"])  # type: ignore[arg-type]
    assert (config.data, config.suffixes) == (("python-stdlib",), (".py", ".md", ".rs"))
    assert hash(config) == hash(DataConfig(data=("python-stdlib",), suffixes=(".py", ".md", ".rs")))


def test_it_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        DataConfig().held_out = 0.1  # type: ignore[misc]


def test_importing_it_loads_nothing_heavy() -> None:
    code = (
        "import sys, layerskip.training.data.config\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'tokenizers', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
