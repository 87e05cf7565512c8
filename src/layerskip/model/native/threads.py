"""Which threads work: the kernels' own, while torch's rest.

After each parallel operation, torch's threads wait for the next one without sleeping, for some milliseconds. Beside the
kernels' threads, which work at the same time, they cost more than they save: on two cores, a round with rejection
sampling took 1.7 times as long.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from layerskip.cores import default_threads

_kept: ContextVar[int | None] = ContextVar("threads of the kernels while those of torch rest", default=None)


def kernel_threads() -> int:
    """Threads that kernels use: as many as torch was told to use."""
    return _kept.get() or torch.get_num_threads()


def settle_threads(asked: int | None) -> None:
    """Let torch and kernels use this many threads in this process, or by default the cores that it may use.

    A number that the environment or the program has chosen stays. The default only ever lowers torch's own.

    Args:
        asked: Threads; None: as many as `cores.default_threads` says.
    """
    now = torch.get_num_threads()
    threads = default_threads(now)[0] if asked is None else asked
    if threads != now:
        torch.set_num_threads(threads)


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
