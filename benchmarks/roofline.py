"""What this machine can do: bytes a second that a product of one row reads, the limit of decoding."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from layerskip.model.linear import OneDNNLinear, has_onednn, pack
from layerskip.model.native_library import load_library
from layerskip.model.native_network import NativeLinear

INPUTS, OUTPUTS = 4096, 32_768
"""512 MB in float32: no cache holds it."""
REPETITIONS = 9


@torch.inference_mode()
def matrix_vector_bandwidth(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """GB/s at which weights are read, by kernel; on CUDA, of a plain copy as well (read and written)."""
    weight = torch.randn(OUTPUTS, INPUTS, device=device).to(dtype)
    x = torch.randn(1, INPUTS, device=device).to(dtype)
    kernels: dict[str, Callable[[], object]] = {"torch": lambda: F.linear(x, weight)}
    if has_onednn(device, dtype):
        packed = OneDNNLinear(pack(weight))
        kernels["oneDNN, packed"] = lambda: packed(x)
    if device.type == "cpu" and dtype == torch.float32 and load_library() is not None:
        native = NativeLinear(weight)
        kernels["native"] = lambda: native(x)
    bandwidth = {name: weight.nbytes / _seconds(kernel, device) / 1e9 for name, kernel in kernels.items()}
    if device.type == "cuda":
        target = torch.empty_like(weight)
        bandwidth["copy"] = 2 * weight.nbytes / _seconds(lambda: target.copy_(weight), device) / 1e9
    return bandwidth


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(REPETITIONS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
