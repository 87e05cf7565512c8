"""Quantized checkpoints as other programs write them, packed here by the published layouts; for tests.

Shapes: O output width, I input width, G groups of inputs.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs AWQ has at each place of a word, from the lowest bits on."""


def words(values: np.ndarray, bits: int) -> np.ndarray:
    """[R, C] numbers from 0 on -> [R, C * bits / 32] words, the first number in the lowest bits."""
    count = 32 // bits
    total = np.zeros((values.shape[0], values.shape[1] // count), dtype=np.uint64)
    for place in range(count):
        total |= values[:, place::count].astype(np.uint64) << np.uint64(place * bits)
    return total.astype(np.uint32).view(np.int32)


def tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def packed(numbers: np.ndarray, zeros: np.ndarray | None, scales: torch.Tensor, bits: int) -> Tensors:
    """compressed-tensors' pack-quantized: numbers and zero points are shifted to begin at 0."""
    middle = 1 << bits - 1
    stored = {
        "weight_packed": tensor(words(numbers + middle, bits)),
        "weight_scale": scales,
        "weight_shape": torch.tensor(numbers.shape),
    }
    if zeros is not None:
        stored["weight_zero_point"] = tensor(words((zeros + middle).T, bits).T)
    return stored


def integers(numbers: np.ndarray, zeros: np.ndarray | None, scales: torch.Tensor, bits: int) -> Tensors:
    """compressed-tensors' int-quantized: a byte for each number."""
    stored = {"weight": tensor(numbers.astype(np.int8)), "weight_scale": scales}
    return stored if zeros is None else {**stored, "weight_zero_point": tensor(zeros.astype(np.int8))}


def gptq(numbers: np.ndarray, zeros: np.ndarray | None, scales: torch.Tensor, bits: int) -> Tensors:
    """GPTQ: transposed, packed along the inputs; a zero point is stored less one."""
    middle = 1 << bits - 1
    zeros = np.zeros(scales.shape, dtype=np.int64) if zeros is None else zeros
    size = numbers.shape[1] // scales.shape[1]
    return {
        "qweight": tensor(words(numbers + middle, bits).T),
        "qzeros": tensor(words((zeros + middle - 1).T & (1 << bits) - 1, bits)),
        "scales": scales.T.contiguous(),
        "g_idx": torch.arange(numbers.shape[1], dtype=torch.int32) // size,
    }


def awq(numbers: np.ndarray, zeros: np.ndarray | None, scales: torch.Tensor, bits: int) -> Tensors:
    """AWQ: transposed, packed along the outputs, eight of them in an order of their own."""
    assert bits == 4
    zeros = np.zeros(scales.shape, dtype=np.int64) if zeros is None else zeros

    def in_order(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values[:, start + np.array(AWQ_ORDER)] for start in range(0, values.shape[1], 8)], 1)

    return {
        "qweight": tensor(words(in_order(numbers.T + 8), 4)),
        "qzeros": tensor(words(in_order(zeros.T + 8), 4)),
        "scales": scales.T.contiguous(),
    }


def torchao(numbers: np.ndarray, zeros: np.ndarray | None, scales: torch.Tensor, bits: int) -> Tensors:
    """torchao's tensors of whole numbers."""
    zeros = np.zeros(scales.shape, dtype=np.int64) if zeros is None else zeros
    return {
        "_weight_qdata": tensor(numbers.astype(np.int8)),
        "_weight_scale": scales,
        "_weight_zero_point": tensor(zeros.astype(np.int8)),
    }


PACKERS: dict[str, Callable[..., Tensors]] = {
    "pack-quantized": packed,
    "int-quantized": integers,
    "gptq": gptq,
    "awq": awq,
    "torchao": torchao,
}


def describe(kind: str, bits: int, group_size: int | None, *, symmetric: bool, **changes: Any) -> dict[str, Any]:
    """The `quantization_config` that goes with it."""
    if kind in ("pack-quantized", "int-quantized"):
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": symmetric,
            "strategy": "channel" if group_size is None else "group",
            "group_size": group_size,
        }
        groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
        return {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups, "ignore": ["lm_head"]}
    if kind == "torchao":
        type_ = "Int8WeightOnlyConfig" if group_size is None and symmetric else "IntxWeightOnlyConfig"
        mapping = "SYMMETRIC" if symmetric else "ASYMMETRIC"
        data = {
            "weight_dtype": {"_type": "torch.dtype", "_data": f"int{bits}"},
            "mapping_type": {"_type": "MappingType", "_data": mapping},
        }
        return {"quant_method": kind, "quant_type": {"default": {"_type": type_, "_data": data, "_version": 2}}}
    size = -1 if group_size is None else group_size
    return {"quant_method": kind, "bits": bits, "group_size": size, "sym": symmetric, "desc_act": False, **changes}


def quantize_folder(
    plain: Path,
    to: Path,
    kind: str,
    *,
    bits: int,
    group_size: int | None,
    symmetric: bool = True,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
    head: bool = False,
) -> Path:
    """Write a checkpoint with random whole numbers in place of another one's matrices.

    Args:
        plain: A checkpoint of floats in one file.
        to: Folder of the quantized one; beside it, `to`-floats gets the numbers that its weights stand for.
        kind: A key of `PACKERS`.
        bits: 8 or 4.
        group_size: Inputs that share a scale; None: all.
        symmetric: Without zero points (other than in the middle).
        dtype: Of the scales.
        seed: Of the numbers.
        head: Whether the head is quantized, too.

    Returns:
        The folder with floats.
    """
    generator = np.random.default_rng(seed)
    floats = to.with_name(f"{to.name}-floats")
    for folder in (to, floats):
        shutil.copytree(plain, folder)
    stored, meant = {}, {}
    for name, weight in load_file(plain / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj") and not (head and module == "lm_head"):
            stored[name] = meant[name] = weight
            continue
        outputs, inputs = weight.shape
        groups = 1 if group_size is None else inputs // group_size
        middle = 1 << bits - 1
        numbers = generator.integers(-middle, middle, (outputs, inputs))
        zeros = None if symmetric else generator.integers(1 - middle, middle, (outputs, groups))
        scales = torch.from_numpy(generator.uniform(0.2, 1, (outputs, groups)) * 0.5 / middle).to(dtype)
        shifted = numbers if zeros is None else numbers - np.repeat(zeros, inputs // groups, 1)
        wide = scales.float().repeat_interleave(inputs // groups, 1)
        meant[name] = torch.from_numpy(shifted).float() * wide
        for key, value in PACKERS[kind](numbers, zeros, scales, bits).items():
            stored[f"{module}.{key}"] = value
    save_file(stored, to / "model.safetensors", metadata={"format": "pt"})
    save_file(meant, floats / "model.safetensors", metadata={"format": "pt"})
    set_quantization(to, describe(kind, bits, group_size, symmetric=symmetric))
    return floats


def set_quantization(folder: Path, given: Any) -> None:
    """Set config.json's `quantization_config`."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": given}))
