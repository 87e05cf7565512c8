"""Exit adapters for tiny models, made of the model's own weights, so that some of their drafts are accepted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_tiny_adapters(
    folder: Path,
    model: Path,
    exits: Sequence[int],
    *,
    tokens: Sequence[int] | None = None,
    reads_values: bool = True,
    noise: float = 0.1,
    seed: int = 0,
) -> Path:
    """Write adapters that are noisy copies of a model's last layer.

    Args:
        folder: Where to; made if need be.
        model: The checkpoint.
        exits: Number of layers before each adapter.
        tokens: Ids that they draft among, ascending; all if not given.
        reads_values: Whether they read values of the first and the last layer.
        noise: Standard deviation of what is added to each weight, in that of the weight.
        seed: Seed of the noise.
    """
    import torch

    from layerskip.checkpoint.checkpoint import Checkpoint
    from layerskip.checkpoint.exit_adapters import write_adapters
    from layerskip.checkpoint.loading.adapters import AdapterDescription, AdapterSet, describe_base, tensor_name
    from layerskip.model.positions import DISTANCES

    checkpoint = Checkpoint.in_folder(model)
    config, source = checkpoint.network_config, checkpoint.weights
    generator = torch.Generator().manual_seed(seed)

    def noisy(weight: torch.Tensor) -> torch.Tensor:
        weight = weight.float()
        return (weight + noise * weight.std() * torch.randn(weight.shape, generator=generator)).contiguous()

    prefix = f"model.layers.{config.num_layers - 1}."
    tensors: dict[str, Any] = {}
    for exit_layer in exits:
        for name in sorted(source.names()):
            if name.startswith(prefix):
                tensors[tensor_name(exit_layer, f"layer.{name.removeprefix(prefix)}")] = noisy(source.get(name))
        tensors[tensor_name(exit_layer, "norm.weight")] = source.get("model.norm.weight").float().clone()
        tensors[tensor_name(exit_layer, "input_proj.weight")] = noisy(torch.eye(config.hidden_size))
        if reads_values:
            size = 2 * config.num_key_value_heads * config.head_dim
            weight = torch.randn(config.hidden_size, size, generator=generator)
            tensors[tensor_name(exit_layer, "value_proj.weight")] = noise * weight
            distances = torch.randn(DISTANCES, config.hidden_size, generator=generator)
            tensors[tensor_name(exit_layer, "distances")] = noise * distances
        if tokens is not None:
            tensors[tensor_name(exit_layer, "token_ids")] = torch.tensor(list(tokens), dtype=torch.int32)
    size = None if tokens is None else len(tokens)
    layers = (0, config.num_layers - 1) if reads_values else ()
    adapters = tuple(AdapterDescription(exit_layer=e, vocabulary_size=size, value_layers=layers) for e in exits)
    folder.mkdir(parents=True, exist_ok=True)
    write_adapters(folder, AdapterSet(base=describe_base("tiny", config, source), adapters=adapters), tensors)
    return folder
