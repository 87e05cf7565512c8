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
from gguf import GGMLQuantizationType
from gguf_files import convert
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
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
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


# argv: a small checkpoint; the large one; options of loading as JSON. Prints MB planned and measured: kept, and peak.
COMPARE = """
import json
import sys
from pathlib import Path

import torch

from layerskip.checkpoint.checkpoint import open_checkpoint
from layerskip.checkpoint.loading.config import LoadingConfig
from layerskip.checkpoint.loading.memory.plan import loading_memory
from layerskip.checkpoint.loading.memory.weights import weights_of
from layerskip.checkpoint.loading.plan import choose_plan
from layerskip.model.native.memory import return_freed_memory

torch.set_num_threads(1)
how = LoadingConfig(device="cpu", dtype="float32", max_context=16, **json.loads(sys.argv[3]))


def megabytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


kept = open_checkpoint(sys.argv[1]).load_decoder(how)
checkpoint = open_checkpoint(sys.argv[2])
plan = choose_plan(checkpoint, how)
planned = loading_memory(weights_of(checkpoint.network_config, checkpoint.weights, plan))
return_freed_memory()
baseline = megabytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
decoder = checkpoint.load_decoder(how)
measured = megabytes("VmRSS") - baseline, megabytes("VmHWM") - baseline
print(json.dumps([planned.kept / 2**20, planned.peak / 2**20, *measured]))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
@pytest.mark.skipif(load_library() is None, reason="not built")
@pytest.mark.parametrize(
    ("type_", "options"),
    [
        (None, {}),
        (None, {"quantize": "int8"}),
        (None, {"kernels": "torch"}),
        ("Q8_0", {}),
        ("Q4_K", {}),
        ("Q8_0", {"quantize": "int4"}),
        ("Q4_0", {"kernels": "torch"}),
    ],
)
def test_memory_is_what_was_planned(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], type_: str | None, options: dict[str, str]
) -> None:
    write_checkpoint(tmp_path / "large", tied=False, width=WIDE // 2, num_files=1, dtype=torch.bfloat16)
    model = tmp_path / "large"
    if type_ is not None:
        model = convert(tmp_path / "large", tmp_path / "large.gguf", type_=GGMLQuantizationType[type_])
    environment = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMPARE, str(tiny_checkpoint()), str(model), json.dumps(options)]
    allowance = 4  # MB of large pages that are used in part, and of small objects
    # A peak lasts for a moment, and pages of a file that the system drops meanwhile aren't in it: a low one is measured
    # again. None may be higher.
    for _ in range(3):
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert result.returncode == 0, result.stderr
        planned, planned_peak, kept, peak = json.loads(result.stdout)
        assert planned * 0.95 - allowance <= kept <= planned * 1.05 + allowance
        assert peak <= planned_peak * 1.05 + allowance
        if peak >= planned_peak * 0.95 - allowance:
            break
    else:
        pytest.fail(f"the peak was {peak} MB, and {planned_peak} were planned")
    shutil.rmtree(tmp_path / "large")
    (tmp_path / "large.gguf").unlink(missing_ok=True)


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
