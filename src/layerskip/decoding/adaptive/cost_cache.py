"""Costs from one process to the next: timing a large network on a CPU takes longer than many a generation.

What a file says is taken as it is. A machine that is busier today makes all rounds slower, and the rounds themselves
correct that (`round_times.py`).
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from layerskip.decoding.adaptive.costs import Costs
from layerskip.files import cache_folder, parse_json, write_atomically
from layerskip.machine import processor_name
from layerskip.model.decoder import Decoder
from layerskip.model.native.library import kernels_version


def read_costs(decoder: Decoder, num_rows: int) -> Costs | None:
    """Costs of a batch size that were measured earlier; None if there are none."""
    try:
        return Costs.from_json(parse_json(_path(decoder, num_rows).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError, KeyError):  # not there, or of another version
        return None


def write_costs(decoder: Decoder, num_rows: int, costs: Costs) -> None:
    """Keep the costs of a batch size for later processes."""
    path = _path(decoder, num_rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(costs)))
    except OSError:  # a full or read-only disk costs time at the next start, nothing else
        return


def _path(decoder: Decoder, num_rows: int) -> Path:
    return cache_folder() / "costs" / f"{_fingerprint(decoder, num_rows)}.json"


def _fingerprint(decoder: Decoder, num_rows: int) -> str:
    """What costs depend on, hashed."""
    drafter = decoder.drafter(1)
    facts: dict[str, Any] = {
        "model": repr(decoder.config),
        "dtype": str(decoder.dtype),
        "compute": decoder.compute,
        "cache": str(decoder.cache_dtype),
        "kernels": [decoder.kernels, kernels_version()],
        "rounds": decoder.round_kind,
        "bytes": decoder.weight_bytes(0, decoder.num_layers),
        "drafter": [drafter.shares_states, drafter.decoder.weight_bytes(0, 1)],
        "adapters": [decoder.drafter(exit_layer).decoder.adapter_bytes() for exit_layer in decoder.adapted_exits],
        "rows": num_rows,
        "threads": torch.get_num_threads(),
        "device": _device_name(decoder.device),
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()
