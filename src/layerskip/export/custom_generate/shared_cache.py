"""Keys and values of all layers, which drafting and verification write into the same places.

Shapes: B rows, H key heads, Q query tokens, T slots, D width of a head.
"""

from typing import Any

from torch import Tensor
from transformers import DynamicCache

GROWTH = 1.5
"""Factor by which full buffers grow."""


class SharedCache(DynamicCache):
    """A cache with one length for all layers, which the caller sets before each pass.

    `past` is the number of slots before the tokens of the next pass, whatever a layer wrote behind them: a pass
    through later layers only finds the early layers' entries in place, and rejected drafts are overwritten. All slots
    are kept in layers with a sliding window too (their masks leave out what lies before it), as a window that has
    moved on couldn't be moved back.
    """

    def __init__(self, capacity: int) -> None:
        """Make an empty cache.

        Args:
            capacity: Slots to begin with.
        """
        super().__init__()
        self.past = 0
        self._capacity = capacity
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}  # by layer: [B, H, T, D] each

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Write [B, H, Q, D] behind the past; returns the past and what was written."""
        end = self.past + key_states.shape[-2]
        keys, values = self._buffers.get(layer_idx, (None, None))
        if keys is None or values is None or keys.shape[-2] < end:
            keys, values = self._enlarge(layer_idx, key_states, value_states, end)
        keys[:, :, self.past : end].copy_(key_states)
        values[:, :, self.past : end].copy_(value_states)
        return keys[:, :, :end], values[:, :, :end]

    def shift(self, row: int, start: int, end: int, by: int) -> None:
        """Move a row's slots `start` to `end` - 1 by some places to the right (to the left if negative)."""
        for buffers in self._buffers.values():
            for buffer in buffers:
                buffer[row, :, start + by : end + by] = buffer[row, :, start:end].clone()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.past

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.past

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the keys; before transformers 5, the query is given by its positions."""
        queries = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.past + queries, 0

    def __len__(self) -> int:
        return len(self._buffers)

    def __bool__(self) -> bool:
        return True

    def _enlarge(self, layer: int, key_states: Tensor, value_states: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Give a layer buffers for `end` slots, with what is there already."""
        while self._capacity < end:
            self._capacity = int(self._capacity * GROWTH) + 1
        old = self._buffers.get(layer)
        new = []
        for index, states in enumerate((key_states, value_states)):
            buffer = states.new_zeros((*states.shape[:-2], self._capacity, states.shape[-1]))
            if old is not None:
                buffer[:, :, : old[index].shape[-2]] = old[index]
            new.append(buffer)
        self._buffers[layer] = (new[0], new[1])
        return new[0], new[1]
