"""Seconds of work on a device."""

import time

import torch


class Stopwatch:
    """Seconds between marks; on CUDA they are events, read once the device has been waited for anyway."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def since(self, started: float) -> float:
        """Seconds of this process since a moment of `time.perf_counter`; decisions may depend on them."""
        return time.perf_counter() - started

    def wait(self) -> None:
        """Wait until the device has done all that it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def mark(self) -> "float | torch.cuda.Event":
        """The present moment on the device."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    @staticmethod
    def between(start: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
        """Seconds from one mark to a later one that the device has passed."""
        if isinstance(start, float) or isinstance(end, float):
            return float(end) - float(start)  # type: ignore[arg-type]
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000
