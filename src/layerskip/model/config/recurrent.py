"""Families of transformers that keep a running state of a text besides, or instead of, keys and values of every token.

Speculation takes rejected drafts back. Keys and values are taken back by position; a state that every token changes
can't be.
"""

from collections.abc import Mapping
from types import MappingProxyType

RUNNING_STATES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "linear attention": frozenset(
            """
            bailing_hybrid glm5_next glm5_next_text kimi_linear lara_mini minimax olmo_hybrid qwen3_5 qwen3_5_moe
            qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp qwen4_exp_text
            """.split()
        ),
        "state space layers": frozenset(
            """
            bamba falcon_h1 falcon_mamba granitemoehybrid jamba mamba mamba2 nemotron_h zamba zamba2
            """.split()
        ),
        "recurrent layers": frozenset({"recurrent_gemma", "rwkv", "xlstm"}),
        "convolutions over earlier tokens": frozenset(
            """
            inkling2 inkling2_loop inkling2_loop_text inkling2_text inkling_mm_model inkling_text lfm2 lfm2_moe lfm3
            zaya
            """.split()
        ),
        "keys that are compressed over a running window": frozenset({"deepseek_v4"}),
    }
)
"""What changes the state -> the `model_type`s that have it."""


def running_state(model_type: str) -> str | None:
    """What makes a family keep a running state, for a message; None if it isn't known to keep one."""
    return next((kind for kind, families in RUNNING_STATES.items() if model_type in families), None)
