"""The configuration of a model's first layers, and what a model of these layers can't have."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from layerskip.checkpoint.checkpoint import Checkpoint
from layerskip.checkpoint.loading.tensors import check_names
from layerskip.model.config.families import parse_config
from layerskip.model.config.model_config import ModelConfig


def first_layers(checkpoint: Checkpoint, exit_layer: int) -> tuple[dict[str, Any], ModelConfig]:
    """config.json of a model's first layers, and what is read from it.

    Args:
        checkpoint: The whole model.
        exit_layer: E layers.

    Raises:
        InvalidArgumentError: There is no such exit.
        CheckpointError: The model's files are incomplete or damaged.
    """
    whole = checkpoint.network_config
    whole.check_exit_layer(exit_layer)
    check_names(whole, checkpoint.weights.names())
    raw = cut_config(checkpoint.raw_config, exit_layer)
    raw["tie_word_embeddings"] = whole.tie_word_embeddings  # what the files say may be wrong (`with_own_head`)
    return raw, replace(parse_config(raw), tie_word_embeddings=whole.tie_word_embeddings)


def cut_config(raw: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """A config.json of the first layers.

    The training record and the names of Python files go: the first layers were not trained by themselves, and those
    files aren't copied.
    """
    cut = {key: value for key, value in raw.items() if key not in ("layerskip", "auto_map")}
    cut["num_hidden_layers"] = num_layers
    if isinstance(cut.get("layer_types"), list):
        cut["layer_types"] = cut["layer_types"][:num_layers]
    return cut


def adapter_notes(checkpoint: Checkpoint, exit_layer: int | None) -> list[str]:
    """What is lost of the model's exit adapters: all, since no ordinary layer is like them.

    Args:
        checkpoint: The whole model.
        exit_layer: E layers that are written; None: all.
    """
    adapters = checkpoint.find_exit_adapters()
    exits = [] if adapters is None else sorted(adapter.exit_layer for adapter in adapters.adapters)
    if not exits:
        return []
    described = f"exit{'s' if len(exits) > 1 else ''} {', '.join(map(str, exits))}"
    note = (
        f"the model has exit adapters at {described}, which are left out: an adapter begins with a projection of the "
        "state and may read values of later layers, and no model family has such a layer"
    )
    if exit_layer is not None:
        note += f"; this is the bare exit {exit_layer}"
    if exit_layer in exits:
        note += ", whose drafts are accepted less often than with the adapter"
    return [note]
