"""Configurations of a model that is trained: what can be saved of them, and what they must say."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

from layerskip.training.output.saved_config import generation_settings, make_saveable, settle_generation_config


@pytest.mark.parametrize(
    ("raw", "left_out"),
    [
        ({"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}, ["temperature", "top_p"]),
        ({"temperature": 0.6, "top_p": 0.9, "do_sample": True, "eos_token_id": [2, 3]}, []),
        ({"top_k": 20, "do_sample": False, "max_length": 100}, ["top_k"]),
        ({"top_k": 50, "temperature": 1.0, "repetition_penalty": 1.1}, []),
        ({"early_stopping": True, "length_penalty": 2.0}, ["early_stopping", "length_penalty"]),
        ({"early_stopping": True, "length_penalty": 2.0, "num_beams": 2}, []),
        (
            {"num_return_sequences": 3, "max_new_tokens": -1, "bos_token_id": 1},
            ["num_return_sequences", "max_new_tokens"],
        ),
        ({"num_return_sequences": 2, "num_beams": 2}, []),
        ({"cache_implementation": "mine", "early_stopping": "x"}, ["cache_implementation", "early_stopping"]),
        ({"watermarking_config": {"a": 1}, "suppress_tokens": 5, "pad_token_id": "x"},
         ["watermarking_config", "suppress_tokens", "pad_token_id"]),
        ({"pad_token_id": -1, "eos_token_id": 2}, ["pad_token_id"]),
        ({"output_scores": True}, ["output_scores"]),
        ({"output_scores": True, "return_dict_in_generate": True}, []),
        ({"temperature": "warm"}, ["temperature"]),
        ({"transformers_version": "4.30.0", "_from_model_config": True, "top_p": None}, []),
        ({"of_another_program": 1}, []),
    ],
)  # fmt: skip
def test_what_is_kept_of_a_generation_config(raw: dict[str, Any], left_out: list[str], tmp_path: Path) -> None:
    settings, found = settle_generation_config(raw)
    assert found == left_out
    settings.pad_token_id = settings.pad_token_id or 0  # one that was changed is what transformers refuses to save
    settings.save_pretrained(tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    private = {"transformers_version", "_from_model_config", "pad_token_id"}
    for name, value in raw.items():
        if name not in private | set(left_out):
            assert getattr(saved, name) == value


def test_settings_in_config_json_count_where_there_is_no_other_file() -> None:
    config = {"temperature": 0.5, "eos_token_id": 7, "hidden_size": 32}
    assert generation_settings({}, config) == {"temperature": 0.5, "eos_token_id": 7}
    assert generation_settings({"top_p": 0.5}, config) == {"top_p": 0.5}


@pytest.mark.parametrize("tied", [True, False])
def test_the_configuration_says_whether_the_head_is_tied(tiny_checkpoint: Any, tied: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(tie_word_embeddings=tied))
    model.config.tie_word_embeddings = not tied
    make_saveable(model)
    assert model.config.tie_word_embeddings is tied
