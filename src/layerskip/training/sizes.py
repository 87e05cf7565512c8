"""Shapes, by name, of models to train from scratch."""

from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    # Deep and narrow: many layers to skip, and small enough for a laptop's CPU.
    "small": {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 16,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "vocab_size": 2048,
        "max_position_embeddings": 1024,
    },
    # For one GPU.
    "medium": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": 16384,
        "max_position_embeddings": 2048,
    },
}
"""Settings of `LlamaConfig`; the embeddings are tied."""
