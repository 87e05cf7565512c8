"""Models of every family with every switch that changes the computation, beside transformers' own."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import layerskip
from layerskip.language_model import LanguageModel
from layerskip.model.native.library import load_library

FULL, SLIDING = "full_attention", "sliding_attention"
TEXT_LENGTH = 40


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model: its config.json, and changes of it that must change the logits (or the case would prove nothing)."""

    model_type: str
    config: dict[str, Any]
    neutral: tuple[dict[str, Any], ...] = ()
    max_context: int | None = None
    text_length: int = TEXT_LENGTH


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 20.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.05, 1.1, 1.3, 1.5, 1.7],
    "long_factor": [1.0, 1.5, 3.0, 5.0, 9.0, 12.0],
    "partial_rotary_factor": 0.75,
}
UNSCALED = {"rope_type": "default", "partial_rotary_factor": 0.75}
PHI3_LONG = {
    "num_key_value_heads": 2,
    "hidden_size": 64,  # heads of 16 channels, of which 12 are rotated
    "rope_parameters": LONGROPE,
    "original_max_position_embeddings": 64,
    "max_position_embeddings": 256,
}
GEMMA_ROPE = {
    FULL: {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
    SLIDING: {"rope_type": "default", "rope_theta": 300.0},
}

CASES = {
    "llama-gqa-bias-llama3": Case(
        model_type="llama",
        config={
            "head_dim": 16,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
            "rope_parameters": LLAMA3_ROPE,
        },
        neutral=({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},),
    ),
    "llama-mha-tied-linear": Case(
        model_type="llama",
        config={"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_parameters": LINEAR_ROPE},
        neutral=({"rope_parameters": {**LINEAR_ROPE, "factor": 1.0}}, {"rope_parameters": {}}),
    ),
    "llama-mqa-yarn": Case(
        model_type="llama",
        config={"num_key_value_heads": 1, "rms_norm_eps": 0.1, "rope_parameters": YARN_ROPE},
        neutral=(
            {"rope_parameters": {**YARN_ROPE, "attention_factor": 1.0}},
            {"rope_parameters": {**YARN_ROPE, "truncate": False}},
            {"rms_norm_eps": 1e-5},
        ),
    ),
    "mistral-window": Case(
        model_type="mistral",
        config={"head_dim": 16, "sliding_window": 7, "tie_word_embeddings": False},
        neutral=({"sliding_window": None}, {"sliding_window": 8}),
    ),
    "mistral-mha-tied-yarn": Case(
        model_type="mistral",
        config={
            "num_key_value_heads": 4,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "rope_parameters": {**YARN_ROPE, "mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 8, "beta_slow": 2},
        },
        neutral=({"rope_parameters": YARN_ROPE}, {"sliding_window": 20}),
    ),
    "qwen2-window": Case(
        model_type="qwen2",
        config={
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 2,
            "tie_word_embeddings": False,
            "layer_types": None,
        },
        neutral=({"use_sliding_window": False, "layer_types": None}, {"layer_types": [SLIDING] * 4}),
    ),
    "qwen2-mha-tied-yarn": Case(
        model_type="qwen2",
        config={
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "sliding_window": 6,
            "rope_parameters": {**YARN_ROPE, "truncate": False},
        },
        neutral=({"rope_parameters": YARN_ROPE},),
    ),
    "qwen3-gqa-bias": Case(
        model_type="qwen3",
        config={"head_dim": 16, "attention_bias": True, "tie_word_embeddings": False, "rope_parameters": LLAMA3_ROPE},
        neutral=({"rope_parameters": {}},),
    ),
    "qwen3-mha-tied-window": Case(
        model_type="qwen3",
        config={
            "num_key_value_heads": 4,
            "head_dim": 8,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
        neutral=({"use_sliding_window": False, "layer_types": None},),
    ),
    "gemma3-pattern-softcap": Case(
        model_type="gemma3_text",
        config={
            "num_hidden_layers": 6,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "sliding_window": 5,
            "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 24,
            "final_logit_softcapping": 2.0,
        },
        neutral=(
            {"final_logit_softcapping": None},
            {"query_pre_attn_scalar": 16},
            {"sliding_window": 6},
            {"layer_types": [SLIDING] * 6},
            {"rope_parameters": {FULL: {"rope_theta": 10_000.0}, SLIDING: {"rope_theta": 10_000.0}}},
        ),
    ),
    "gemma3-untied-bias-linear": Case(
        model_type="gemma3_text",
        config={
            "num_key_value_heads": 4,
            "head_dim": 8,
            "sliding_window": 7,
            "layer_types": [FULL, SLIDING, SLIDING, FULL],
            "tie_word_embeddings": False,
            "attention_bias": True,
            "hidden_activation": "gelu",
            "rope_parameters": GEMMA_ROPE,
        },
        neutral=(
            {"hidden_activation": "gelu_pytorch_tanh"},
            {"layer_types": [SLIDING, FULL, FULL, SLIDING]},
            {"rope_parameters": {**GEMMA_ROPE, SLIDING: {"rope_theta": 10_000.0}}},
        ),
    ),
    "phi3-longrope-short": Case(
        model_type="phi3",
        config=PHI3_LONG,
        neutral=({"max_position_embeddings": 64}, {"rope_parameters": UNSCALED}),
    ),
    "phi3-longrope-long": Case(
        model_type="phi3",
        config={**PHI3_LONG, "original_max_position_embeddings": 32, "tie_word_embeddings": True},
        neutral=({"original_max_position_embeddings": 64},),
        max_context=128,
    ),
    "phi3-mha-window": Case(
        model_type="phi3",
        config={"num_key_value_heads": 4, "sliding_window": 9, "rms_norm_eps": 1e-5},
        neutral=({"sliding_window": None},),
    ),
    "olmo2-gqa-bias": Case(
        model_type="olmo2",
        config={"head_dim": 16, "attention_bias": True, "rms_norm_eps": 1e-3, "rope_parameters": LLAMA3_ROPE},
        neutral=({"rope_parameters": {}}, {"rms_norm_eps": 1e-6}),
    ),
    "olmo2-mha-tied": Case(
        model_type="olmo2", config={"num_key_value_heads": 4, "tie_word_embeddings": True, "rms_norm_eps": 1e-6}
    ),
    "granite-multipliers": Case(
        model_type="granite",
        config={
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.7,
            "logits_scaling": 1.5,
        },
        neutral=(
            {"embedding_multiplier": 1.0},
            {"attention_multiplier": 8**-0.5},
            {"residual_multiplier": 1.0},
            {"logits_scaling": 1.0},
        ),
    ),
    "granite-bias-tied-linear": Case(
        model_type="granite",
        config={
            "head_dim": 16,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "attention_multiplier": 0.25,
            "rope_parameters": LINEAR_ROPE,
        },
        neutral=({"rope_parameters": {}},),
    ),
    "smollm3-some-rotated": Case(
        model_type="smollm3",
        config={"no_rope_layers": [1, 0, 1, 1], "rope_parameters": {"rope_theta": 300.0}},
        neutral=({"no_rope_layers": [1, 1, 1, 1]}, {"no_rope_layers": [1, 0, 1, 0]}),
    ),
    "smollm3-window-bias-untied": Case(
        model_type="smollm3",
        config={
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 6,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
            "rope_parameters": YARN_ROPE,
        },
        neutral=(
            {"layer_types": None, "use_sliding_window": False},
            {"layer_types": [SLIDING] * 4},
            {"no_rope_layers": None, "no_rope_layer_interval": 4},
        ),
    ),
}

CASES |= {
    "mixtral-window": Case(
        model_type="mixtral",
        config={"num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 7, "tie_word_embeddings": True},
        neutral=({"sliding_window": None}, {"num_experts_per_tok": 2}, {"num_experts_per_tok": 4}),
    ),
    "mixtral-mha-many-experts": Case(
        model_type="mixtral",
        config={"num_local_experts": 21, "num_experts_per_tok": 2, "num_key_value_heads": 4, "head_dim": 16},
        neutral=({"num_experts_per_tok": 1},),
    ),
    "qwen3_moe-normed": Case(
        model_type="qwen3_moe",
        config={
            "head_dim": 16,
            "num_experts": 20,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "attention_bias": True,
        },
        neutral=({"norm_topk_prob": False}, {"num_experts_per_tok": 3}),
    ),
    "qwen3_moe-some-dense": Case(
        model_type="qwen3_moe",
        config={
            "num_hidden_layers": 6,
            "head_dim": 8,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "use_sliding_window": True,
            "sliding_window": 6,
        },
        neutral=({"use_sliding_window": False, "sliding_window": None}, {"norm_topk_prob": True}),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One checkpoint in our decoder and in transformers, and a text with transformers' logits."""

    case: Case
    folder: Path
    ours: LanguageModel
    theirs: Any
    tokens: list[int]
    logits: Tensor
    """[Q, V], transformers' logits of the whole text."""

    def reference(self, tokens: list[int]) -> Tensor:
        """transformers' logits of another whole text, [Q, V]."""
        with torch.inference_mode():
            return self.theirs(torch.tensor([tokens])).logits[0]


@pytest.fixture(scope="module", params=["torch", "native"])
def kernels(request: pytest.FixtureRequest) -> str:
    """Either kind of kernels."""
    if request.param == "native" and load_library() is None:
        pytest.skip("the compiled kernels weren't built")
    name: str = request.param
    return name


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, kernels: str, tiny_checkpoint: Callable[..., Path]) -> Pair:
    """Each case in turn."""
    case = CASES[request.param]
    folder = tiny_checkpoint(case.model_type, seed=len(request.param), **case.config)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = torch.randint(0, 96, (case.text_length,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        logits = theirs(torch.tensor([tokens])).logits[0]
    ours = layerskip.load(str(folder), max_context=case.max_context, kernels=kernels)
    return Pair(case=case, folder=folder, ours=ours, theirs=theirs, tokens=tokens, logits=logits)


@pytest.fixture
def changed_logits(pair: Pair, tmp_path: Path) -> Callable[[dict[str, Any]], Tensor]:
    """Our logits of the pair's text with other values in config.json and the same weights."""

    def run(changes: dict[str, Any]) -> Tensor:
        shutil.copytree(pair.folder, tmp_path, dirs_exist_ok=True)
        raw = json.loads((pair.folder / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**raw, **changes}))
        return layerskip.load(str(tmp_path), max_context=pair.case.max_context).logits(pair.tokens)

    return run
