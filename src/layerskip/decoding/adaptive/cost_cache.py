"""Costs from one process to the next: timing a large network on a CPU takes longer than many a generation."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from layerskip.decoding.adaptive.costs import CallTimer, Costs, measure_costs
from layerskip.files import cache_folder, parse_json, write_atomically
from layerskip.machine import processor_name
from layerskip.model.decoder import Decoder

TOLERANCE = 1.25
"""By how much a step may differ from what the file says before all is measured again."""


def find_costs(decoder: Decoder, num_rows: int) -> Costs:
    """Costs of a batch size: from a file, if a step still takes as long as it says; measured and kept otherwise."""
    path = cache_folder() / "costs" / f"{_fingerprint(decoder, num_rows)}.json"
    costs = _read(path)
    if costs is None or not _still_true(costs, decoder, num_rows):
        costs = measure_costs(decoder, num_rows)
        _write(path, costs)
    return costs


def _still_true(costs: Costs, decoder: Decoder, num_rows: int) -> bool:
    step = CallTimer(decoder, num_rows, 1, summary=min).seconds(0, decoder.num_layers, 1)
    return 1 / TOLERANCE < step / costs.step() < TOLERANCE


def _read(path: Path) -> Costs | None:
    try:
        return Costs.from_json(parse_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError):  # not there, or of another version
        return None


def _write(path: Path, costs: Costs) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(costs)))
    except OSError:  # a full or read-only disk costs time at the next start, nothing else
        return


def _fingerprint(decoder: Decoder, num_rows: int) -> str:
    """What costs depend on, hashed."""
    drafter = decoder.drafter(1)
    facts: dict[str, Any] = {
        "model": repr(decoder.config),
        "dtype": str(decoder.dtype),
        "kernels": decoder.kernels,
        "bytes": decoder.weight_bytes(0, decoder.num_layers),
        "drafter": [drafter.shares_states, drafter.decoder.weight_bytes(0, 1)],
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
