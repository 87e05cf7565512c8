"""The ranks that share a network, and what they exchange.

Shapes: N ranks.
"""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from layerskip.errors import InvalidArgumentError
from layerskip.model.parallel.watch import lost, process_watch


@dataclass(kw_only=True)
class Traffic:
    """What a rank has given to the others."""

    calls: int = 0
    num_bytes: int = 0
    """Bytes, each counted once however many ranks they go to."""


class RankGroup:
    """All ranks of torch's process group. Every rank makes the same calls in the same order."""

    def __init__(self) -> None:
        """Take the process group that has been initialised."""
        self.rank: int = dist.get_rank()
        self.size: int = dist.get_world_size()
        self.watch = process_watch()
        self.sums, self.others = Traffic(), Traffic()
        """Reductions of hidden states, and all else."""

    @classmethod
    def of(cls, num_ranks: int) -> "RankGroup":
        """The group of `num_ranks` ranks that this process belongs to.

        Raises:
            InvalidArgumentError: There is no process group, or one of another size.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise InvalidArgumentError(
                f"tensor_parallel {num_ranks} needs as many processes: start them with "
                f"torchrun --nproc-per-node {num_ranks} -m layerskip COMMAND, or call "
                "torch.distributed.init_process_group first"
            )
        group = cls()
        if group.size != num_ranks:
            raise InvalidArgumentError(
                f"tensor_parallel {num_ranks} differs from the process group's {group.size} ranks; use {group.size}"
            )
        return group

    def sum(self, part: Tensor) -> Tensor:
        """The sum of the ranks' tensors, the same bits in every rank.

        On a CPU, parts are added in the order of the ranks, whatever the tensor's size: a token's sum doesn't depend on
        the tokens computed with it, so that verification gives the bits of single steps.
        """
        self._count(self.sums, part)
        if part.device.type == "cuda":
            total = part.contiguous()
            total = total.clone() if total is part else total
            with lost():
                dist.all_reduce(total)
            return total
        parts = self._gather(part)
        if part.dtype != torch.float32:
            return parts.float().sum(0).to(part.dtype)
        total = parts[0]
        for rank in range(1, self.size):
            total += parts[rank]
        return total

    def gather(self, part: Tensor) -> Tensor:
        """The ranks' tensors of one shape, [N, ...]."""
        self._count(self.others, part)
        return self._gather(part)

    def slowest(self, seconds: float) -> float:
        """The largest of the ranks' seconds."""
        return float(self.gather(torch.tensor([seconds], dtype=torch.float64, device=self._device)).max())

    def first(self, number: int) -> int:
        """The number of rank 0, below 2^63."""
        return int(self.gather(torch.tensor([number], device=self._device))[0])

    def first_bytes(self, content: bytes | None) -> bytes | None:
        """The bytes of rank 0, or its None; what other ranks give doesn't matter."""
        length = self.first(-1 if content is None else len(content))
        if length <= 0:
            return None if length < 0 else b""
        own = bytearray(content if self.rank == 0 and content is not None else bytes(length))
        data = torch.frombuffer(own, dtype=torch.uint8).to(self._device or "cpu")
        self._count(self.others, data)
        with lost():
            dist.broadcast(data, src=0)
        return data.cpu().numpy().tobytes()

    @property
    def local_rank(self) -> int:
        """Which of the ranks of its machine this one is: the number of its GPU."""
        return int(os.environ.get("LOCAL_RANK", self.rank))

    @property
    def _device(self) -> torch.device | None:
        """Where small numbers are exchanged: on the CPU, unless only GPUs can exchange anything."""
        only_gpus = "gloo" not in dist.get_backend_config()
        return torch.device("cuda", torch.cuda.current_device()) if only_gpus else None

    def _gather(self, part: Tensor) -> Tensor:
        part = part.contiguous()
        parts = part.new_empty((self.size, *part.shape))
        with lost():
            if part.device.type == "cuda":
                # Under its newer name where torch has that: the older one warns.
                gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
                gather(parts.view(-1), part.view(-1))
            else:
                self._exchange(part, parts)
        return parts

    def _exchange(self, part: Tensor, parts: Tensor) -> None:
        """Send a tensor to every other rank, and receive theirs.

        gloo's own collective takes four times as long for a small tensor and two ranks.
        """
        others = [rank for rank in range(self.size) if rank != self.rank]
        works = [dist.irecv(parts[rank], rank) for rank in others]  # before anything is sent, so that nothing waits
        works += [dist.isend(part, rank) for rank in others]
        parts[self.rank] = part
        for work in works:
            assert work is not None, "this rank is a member of the group"
            work.wait()

    @staticmethod
    def _count(traffic: Traffic, part: Tensor) -> None:
        traffic.calls += 1
        traffic.num_bytes += part.numel() * part.itemsize
