"""A real network with weights set by hand: what it writes after a token is decided by that token alone."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import contributing_layer
from transformers import PreTrainedTokenizerBase


def write_parrot(
    tiny_checkpoint: Callable[..., Path],
    tokenizer: PreTrainedTokenizerBase,
    follows: Mapping[str, str],
    *,
    generation_config: Mapping[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A checkpoint whose layers add nothing: each token has a component of its own, and the head maps it to the next.

    Args:
        tiny_checkpoint: The fixture.
        tokenizer: Saved beside it.
        follows: For each token the one that follows it; after all others comes the first of these.
        generation_config: Contents of generation_config.json; no such file if not given.
        **config: Keys of config.json.
    """
    size = -(-len(tokenizer) // 16) * 16
    folder = tiny_checkpoint(vocab_size=size, hidden_size=size, num_hidden_layers=2, **config)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if contributing_layer(name) >= 0:
            tensor.zero_()
        elif "norm" in name:
            tensor.fill_(1)
    first = tokenizer.convert_tokens_to_ids(next(iter(follows)))
    head = torch.zeros(size, size)
    head[first] = 1
    for token, following in follows.items():
        token_id, following_id = tokenizer.convert_tokens_to_ids([token, following])
        head[:, token_id] = 0
        head[following_id, token_id] = 1
    tensors["model.embed_tokens.weight"] = torch.eye(size)
    tensors["lm_head.weight"] = head
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation_config is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation_config))
    tokenizer.save_pretrained(folder)
    return folder
