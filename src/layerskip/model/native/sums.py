"""Sums over the processes that share a network, for compiled code that has computed a part of them.

Shapes: N floats.
"""

import ctypes

import torch

from layerskip.model.native.library import NetworkView
from layerskip.model.parallel.share import Membership

_TOTAL = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_float), ctypes.c_int64)


class Sums:
    """What `Network.total` of native/network.h calls."""

    def __init__(self, member: Membership) -> None:
        """Begin.

        Args:
            member: The processes, and this one's part of the network.
        """
        self._member = member
        self._counted = (ctypes.c_float * len(member.counted))(*member.counted)
        self._function = _TOTAL(self._total)
        self._failure: BaseException | None = None

    def join(self, network: NetworkView) -> None:
        """Let a network's passes use these sums; this object must live as long."""
        whole = self._member.config
        network.all_heads, network.all_kv_heads = whole.num_attention_heads, whole.num_key_value_heads
        network.counted = ctypes.addressof(self._counted)
        network.total = ctypes.cast(self._function, ctypes.c_void_p).value

    def check(self) -> None:
        """Raise what went wrong in a sum: no exception can pass through compiled code."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _total(self, numbers: "ctypes._Pointer[ctypes.c_float]", count: int) -> None:
        """Replace [N] floats by their sums over all processes."""
        if self._failure is not None:
            return
        try:
            array = ctypes.cast(numbers, ctypes.POINTER(ctypes.c_float * count)).contents
            part = torch.frombuffer(array, dtype=torch.float32)
            part.copy_(self._member.group.sum(part))
        except BaseException as error:
            self._failure = error
