"""Which threads work: the kernels' own, while torch's rest.

After each parallel operation, torch's threads wait for the next one without sleeping, for some milliseconds. Beside the
kernels' threads, which work at the same time, they cost more than they save: on two cores, a round with rejection
sampling took 1.7 times as long.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_kept: ContextVar[int | None] = ContextVar("threads of the kernels while those of torch rest", default=None)


def kernel_threads() -> int:
    """Threads that kernels use: as many as torch was told to use."""
    return _kept.get() or torch.get_num_threads()


@contextmanager
def torch_at_rest() -> Iterator[None]:
    """Let operations of torch run on the calling thread only; kernels keep their threads."""
    if _kept.get() is not None:
        yield
        return
    threads = torch.get_num_threads()
    token = _kept.set(threads)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _kept.reset(token)
