"""The limit of decoding on this machine: bytes that a product of one row reads in a second."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from layerskip.model.native.library import load_library
from layerskip.model.native.linear import NativeLinear
from layerskip.model.torch.linear import OneDNNLinear, has_onednn, pack

INPUTS, OUTPUTS = 4096, 32_768
"""Width of a weight of 512 MB in float32, more than any cache holds."""
REPETITIONS = 5


class Roofline:
    """Products of one row with a large weight, by every kernel there is; on CUDA a plain copy as well."""

    @torch.inference_mode()
    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        weight = torch.randn(OUTPUTS, INPUTS, device=device).to(dtype)
        x = torch.randn(1, INPUTS, device=device).to(dtype)
        self._bytes = weight.nbytes
        self._kernels: dict[str, Callable[[], object]] = {"torch": lambda: F.linear(x, weight)}
        if has_onednn(device, dtype):
            packed = OneDNNLinear(pack(weight))
            self._kernels["oneDNN, packed"] = lambda: packed(x)
        if device.type == "cpu" and dtype == torch.float32 and load_library() is not None:
            native = NativeLinear(weight)
            self._kernels["native"] = lambda: native(x)
        if device.type == "cuda":
            target = torch.empty_like(weight)
            self._kernels["copy"] = lambda: target.copy_(weight)

    @torch.inference_mode()
    def gigabytes_per_second(self) -> dict[str, float]:
        """GB that each kernel reads in a second (a copy also writes them, and both count)."""
        return {
            name: (2 if name == "copy" else 1) * self._bytes / self._seconds(kernel) / 1e9
            for name, kernel in self._kernels.items()
        }

    def _seconds(self, call: Callable[[], object]) -> float:
        times = []
        for _ in range(REPETITIONS):
            self._wait()
            start = time.perf_counter()
            call()
            self._wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
