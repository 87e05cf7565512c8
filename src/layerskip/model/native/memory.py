"""Memory for packed weights, on large pages where the system has them.

Decoding reads all weights for each token. On large pages a core spends less time on translating addresses: reading was
measured to be a quarter faster (`benchmarks/engine.py` prints this machine's bytes per second).
"""

import contextlib
import ctypes
import mmap

import torch
from torch import Tensor

CHUNK_BYTES = 128 * 2**20
"""Bytes to map at once; pages that are never written to take no memory, but the last large page of a chunk is whole."""
LARGE_PAGE_BYTES = 2 * 2**20
ALIGNMENT = 64
"""Bytes of a cache line, to which tensors are aligned."""


class WeightMemory:
    """Divides large mappings among tensors; a mapping lives as long as any tensor in it."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)

    def empty(self, num_bytes: int) -> Tensor:
        """[num_bytes] of uint8, aligned to a cache line, not initialised."""
        padded = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        if padded > len(self._chunk):
            self._chunk = _map(max(padded, CHUNK_BYTES))
        piece, self._chunk = self._chunk[:num_bytes], self._chunk[padded:]
        return piece


def map_private(num_bytes: int) -> mmap.mmap:
    """A private mapping: Python's default, which is shared with child processes, doesn't get large pages."""
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, num_bytes)


def return_freed_memory() -> None:
    """Give the system back what has been freed.

    glibc keeps the pages between blocks that are in use: hundreds of MB after weights have been computed from a file's
    blocks.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _map(num_bytes: int) -> Tensor:
    """A mapping that begins and ends at the border of a large page."""
    rounded = -(-num_bytes // LARGE_PAGE_BYTES) * LARGE_PAGE_BYTES
    memory = map_private(rounded + LARGE_PAGE_BYTES)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    mapped = torch.frombuffer(memory, dtype=torch.uint8)
    first = -mapped.data_ptr() % LARGE_PAGE_BYTES
    return mapped[first : first + rounded]
