"""Loading needs little more memory than the network itself, however the checkpoint is laid out."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from layerskip.checkpoint.checkpoint import Checkpoint
from layerskip.checkpoint.loading.tensors import tensor_shapes
from layerskip.model.native.library import load_library
from layerskip.model.torch.linear import WIDE

SRC = Path(__file__).parents[2] / "src"

# argv: a small checkpoint, whose loading brings in every library; the large one; dtype; kernels.
MEASURE = """
import sys
from pathlib import Path

import torch

from layerskip.checkpoint.checkpoint import open_checkpoint
from layerskip.checkpoint.loading.config import LoadingConfig

torch.set_num_threads(1)
how = LoadingConfig(dtype=sys.argv[3], device="cpu", max_context=16, kernels=sys.argv[4])


def megabytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def load(folder):
    decoder = open_checkpoint(folder).load_decoder(how)
    cache = decoder.new_cache(1, 4)
    tokens = torch.tensor([[1, 2, 3]])
    decoder.unembed(decoder.run_layers(decoder.embed(tokens), decoder.place(cache, [0], 3), cache, 0, 2))
    return decoder


load(sys.argv[1])
baseline = megabytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
decoder = load(sys.argv[2])
print(megabytes("VmHWM") - baseline)
"""


def write_checkpoint(folder: Path, *, tied: bool, width: int, num_files: int, dtype: torch.dtype) -> float:
    """A Llama of 200 to 300 MB in float32; returns its exact size in MB (of float32, a tied head once)."""
    config = {
        "model_type": "llama",
        "vocab_size": 16000,
        "hidden_size": width,
        "intermediate_size": 2560,
        "num_hidden_layers": (5 if tied else 4) * WIDE // width,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = tensor_shapes(Checkpoint.in_folder(folder, "").config)
    files = {f"model-{i + 1:05}-of-{num_files:05}.safetensors": list(shapes)[i::num_files] for i in range(num_files)}
    for file, names in files.items():
        save_file({name: torch.full(shapes[name], 0.01, dtype=dtype) for name in names}, folder / file)
    if num_files == 1:
        next(iter(folder.glob("*.safetensors"))).rename(folder / "model.safetensors")
    else:
        weight_map = {name: file for file, names in files.items() for name in names}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return Checkpoint.in_folder(folder, "").num_parameters * 4 / 2**20


@pytest.mark.parametrize(
    "kernels", ["torch", pytest.param("native", marks=pytest.mark.skipif(load_library() is None, reason="not built"))]
)
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("tied", "width", "num_files", "stored"),
    [
        (True, WIDE, 1, "float32"),
        (False, WIDE, 3, "float32"),
        (True, WIDE // 2, 1, "float32"),  # most weights are packed
        (False, WIDE // 2, 3, "float32"),
        (True, WIDE // 2, 2, "bfloat16"),
    ],
)
def test_peak_is_little_more_than_the_network(
    tmp_path: Path,
    tiny_checkpoint: Callable[..., Path],
    tied: bool,
    width: int,
    num_files: int,
    stored: str,
    kernels: str,
) -> None:
    folder = tmp_path / "large"
    size = write_checkpoint(folder, tied=tied, width=width, num_files=num_files, dtype=getattr(torch, stored))
    if kernels == "native" and stored == "bfloat16":  # kept in it
        size /= 2
    environment = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, str(tiny_checkpoint()), str(folder), "float32", kernels]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    shutil.rmtree(folder)  # pytest keeps temporary folders for a while
    assert result.returncode == 0, result.stderr
    peak = float(result.stdout)
    assert peak <= 1.2 * size, f"{peak:.0f} MB for a network of {size:.0f} MB"
    assert peak >= 0.75 * size, "the measurement must see the weights"
