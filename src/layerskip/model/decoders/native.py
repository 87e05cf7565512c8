"""A decoder whose compositions are single calls into compiled code, where these can do what is asked."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from layerskip.model.cache import KVCache
from layerskip.model.decoder import Decoder
from layerskip.model.drafts import DraftRequest, Drafts
from layerskip.model.draw import Draw
from layerskip.model.native.network import NativeNetwork
from layerskip.model.native.threads import torch_at_rest
from layerskip.model.positions import Positions


class NativeDecoder(Decoder):
    """A `Decoder` over a `NativeNetwork`."""

    def __init__(self, *args: Any, network: NativeNetwork, **options: Any) -> None:
        """Take what `Decoder` takes."""
        super().__init__(*args, network=network, **options)
        self._native = network
        # Capping can turn distinct logits into ties, and the kernels don't cap.
        self._can_choose = self.config.final_logit_softcapping is None

    @property
    def compute(self) -> str:
        """As `Decoder.compute`."""
        return self._native.compute

    def own_threads(self) -> AbstractContextManager[None]:
        """As `Decoder.own_threads`."""
        return torch_at_rest()

    def new_cache(self, num_rows: int, capacity: int) -> KVCache:
        """As `Decoder.new_cache`."""
        with torch_at_rest():  # filling it with zeros would wake torch's threads right before the first prompt
            return super().new_cache(num_rows, capacity)

    def choose(
        self,
        inputs: Tensor,
        positions: Positions,
        cache: KVCache,
        start: int,
        stop: int,
        draw: Draw | None = None,
    ) -> Tensor:
        """As `Decoder.choose`."""
        if not self._can_choose or (inputs.dtype == torch.long and not self._native.embeds):
            return super().choose(inputs, positions, cache, start, stop, draw)
        adapter = self._adapters.get(stop, self)
        assert isinstance(adapter, NativeDecoder)
        self.calls.add(start, stop, *inputs.shape[:2])
        if adapter._adapter is not None:
            self.calls.add(adapter._adapter, adapter._adapter + 1, *inputs.shape[:2])
        return adapter._native.choose(inputs, positions, cache, start, stop, draw)

    def _draft(self, tokens: Tensor, cache: KVCache, request: DraftRequest, *, complete: bool) -> Drafts:
        # The most likely draft stays the most likely one under a cap.
        if not self._native.embeds or not (self._can_choose or request.draw is None):
            return super()._draft(tokens, cache, request, complete=complete)
        drafts = self._native.draft(tokens, cache, request, complete=complete)
        for _ in range(drafts.tokens.shape[1] + complete):
            self.calls.add(0, request.exit_layer, cache.num_rows, 1)
            if self._adapter is not None:
                self.calls.add(self._adapter, self._adapter + 1, cache.num_rows, 1)
        return drafts
