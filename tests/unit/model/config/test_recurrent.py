"""Families with a running state are refused by name, before anything but config.json is read."""

import json
from pathlib import Path

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import layerskip
from layerskip.errors import UnsupportedModelError
from layerskip.model.config.families import FAMILIES, parse_config
from layerskip.model.config.recurrent import RUNNING_STATES, running_state

STATEFUL = sorted(name for families in RUNNING_STATES.values() for name in families)


@pytest.mark.parametrize("model_type", STATEFUL)
def test_the_reason_is_named(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError, match="state can't be rolled back to an earlier position") as error:
        parse_config({"model_type": model_type})
    for word in (repr(model_type), str(running_state(model_type)), *FAMILIES):
        assert word in str(error.value)


def test_names_are_those_of_transformers_and_none_is_supported() -> None:
    """Those that several versions of it have."""
    names = set("mamba mamba2 rwkv jamba bamba falcon_h1 recurrent_gemma zamba2 qwen3_next lfm2 minimax".split())
    assert names <= set(STATEFUL) & set(CONFIG_MAPPING_NAMES)
    assert not set(STATEFUL) & set(FAMILIES)


def test_no_weights_are_looked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_next"}))
    with pytest.raises(UnsupportedModelError, match="'qwen3_next' is not supported: it has linear attention"):
        layerskip.load(str(tmp_path))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", ""])
def test_other_families_have_none(model_type: str) -> None:
    assert running_state(model_type) is None
