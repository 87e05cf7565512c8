"""A decoder of which every rank has a part; all ranks run the same code, and choose the same tokens.

Shapes: N ranks, B rows, Q query tokens a row, D width, V vocabulary, W tokens of this rank's part of it.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from layerskip.model.cache import KVCache
from layerskip.model.choosing.sampling import Vocabulary
from layerskip.model.decoder import Decoder
from layerskip.model.decoders.vocabulary_part import VocabularyPart
from layerskip.model.draw import Draw
from layerskip.model.finite import check_finite
from layerskip.model.native.network import NativeNetwork
from layerskip.model.native.threads import torch_at_rest
from layerskip.model.parallel.group import RankGroup
from layerskip.model.parallel.share import Membership
from layerskip.model.stopwatch import Stopwatch


class ParallelDecoder(Decoder):
    """A `Decoder` over one rank's share of a network."""

    def __init__(self, membership: Membership, **options: Any) -> None:
        """Put a share together.

        Args:
            membership: The ranks, and what this one has.
            **options: As for `Decoder`; the weights are those of the share.
        """
        super().__init__(membership.config, own=membership.share.config, **options)
        self._cache_config = membership.cache_config
        self.group = membership.group
        self.stopwatch = _SharedStopwatch(self.device, self.group)
        self._is_native = isinstance(options["network"], NativeNetwork)
        self._part = VocabularyPart(self.group, membership.share.vocabulary)
        self._sizes = membership.vocabulary

    @property
    def compute(self) -> str:
        """As `Decoder.compute`."""
        return self._network.compute if isinstance(self._network, NativeNetwork) else super().compute

    def own_threads(self) -> AbstractContextManager[None]:
        """As `Decoder.own_threads`."""
        return torch_at_rest() if self._is_native else nullcontext()

    def new_cache(self, num_rows: int, capacity: int) -> KVCache:
        """As `Decoder.new_cache`."""
        with self.own_threads():
            return super().new_cache(num_rows, capacity)

    @property
    def num_ranks(self) -> int:
        """N."""
        return self.group.size

    def common(self, number: int) -> int:
        """As `Decoder.common`: rank 0's number."""
        return self.group.first(number)

    def embed(self, tokens: Tensor) -> Tensor:
        """As `Decoder.embed`: the rank that has a token gives its state, the others nothing."""
        part = self._part.tokens
        places = tokens.clamp(min=0) - part.start
        inside = (places >= 0) & (places < len(part))
        hidden = super().embed(places.clamp(0, len(part) - 1))
        return self.group.sum(hidden.masked_fill(~inside.unsqueeze(-1), 0.0))

    def unembed(self, hidden: Tensor, exit_layer: int | None = None) -> Tensor:
        """As `Decoder.unembed`, with the logits of all ranks."""
        if exit_layer in self._adapters:
            return self._adapters[exit_layer].unembed(hidden)
        return self._part.whole(super().unembed(hidden), self._sizes)

    @property
    def vocabulary(self) -> Vocabulary:
        """As `Decoder.vocabulary`: this rank's part."""
        return self._part

    def own_logits(self, hidden: Tensor, exit_layer: int | None = None) -> Tensor:
        """As `Decoder.own_logits`."""
        if exit_layer in self._adapters:
            return self._adapters[exit_layer].own_logits(hidden)
        return super().unembed(hidden)

    def whole_logits(self, own: Tensor) -> Tensor:
        """As `Decoder.whole_logits`."""
        return self._part.whole(own, self._sizes)

    def checked_logits(self, hidden: Tensor, exit_layer: int | None = None) -> Tensor:
        """As `Decoder.checked_logits`."""
        logits = self.unembed(hidden, exit_layer)
        lacking = logits == -torch.inf if exit_layer in self._adapters else None
        check_finite(logits if lacking is None else logits.masked_fill(lacking, 0.0), self.dtype)
        return logits

    def pick(
        self,
        hidden: Tensor,
        draw: Draw | None,
        first: Sequence[int],
        *,
        exit_layer: int | None = None,
        confident: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `Decoder.pick`, from the scores of each rank's part of the vocabulary."""
        if exit_layer in self._adapters:
            return self._adapters[exit_layer].pick(hidden, draw, first, confident=confident)
        part = self._part
        scores = part.filter(draw, super().unembed(hidden))
        return part.choose(scores, draw, first, confident=confident)


class _SharedStopwatch(Stopwatch):
    """Seconds that all ranks agree on: those of the slowest."""

    def __init__(self, device: torch.device, group: RankGroup) -> None:
        super().__init__(device)
        self._group = group

    def since(self, started: float) -> float:
        return self._group.slowest(super().since(started))
