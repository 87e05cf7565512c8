"""Limits of a device's memory, for tests of layers that stay in the CPU's."""

from pathlib import Path


def size_for(folder: Path, layers: int, device: str = "cpu") -> str:
    """Memory with which this many of a float32 checkpoint's layers are on the device."""
    from layerskip.checkpoint.checkpoint import Checkpoint
    from layerskip.checkpoint.loading.config import LoadingConfig
    from layerskip.checkpoint.loading.memory.plan import device_bytes, run_bytes
    from layerskip.checkpoint.loading.memory.weights import weights_of
    from layerskip.checkpoint.loading.plan import choose_plan

    checkpoint = Checkpoint.in_folder(folder)
    options = {"device": device, "kernels": "torch", "dtype": "float32", "compile": "off"}
    plan = choose_plan(checkpoint, LoadingConfig(**options))
    config = checkpoint.network_config
    weights = weights_of(config, checkpoint.weights, plan)
    layer = sum(weight.kept for weight in weights if weight.part == "layers") // config.num_layers
    return str(device_bytes(weights) + run_bytes(config, plan) - (config.num_layers - layers - 2) * layer)
