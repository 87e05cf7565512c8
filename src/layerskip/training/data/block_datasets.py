"""Blocks as torch data sets: all in memory, or packed while the data is read.

N = blocks, T = tokens in a block.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from layerskip.errors import InvalidArgumentError
from layerskip.training.data.packing import Block, Ids


class BlockDataset(Dataset[dict[str, Tensor]]):
    """Blocks in memory. An item is the input of a causal LM: int64 tensors [T], no `attention_mask`."""

    def __init__(self, ids: Ids, labels: Ids | None = None, position_ids: Ids | None = None) -> None:
        """Keep these blocks.

        Args:
            ids: Token ids, [N, T].
            labels: Labels, [N, T]; the ids if not given.
            position_ids: Positions, [N, T], which start at 0 with each example; left out of the items if not given.
        """
        self.ids = ids
        self.labels = labels
        self.position_ids = position_ids

    @classmethod
    def from_blocks(cls, blocks: Sequence[Block], length: int) -> "BlockDataset":
        """Stack blocks of `length` tokens; items have labels and positions if any block has its own."""
        ids = np.stack([block.ids for block in blocks]) if blocks else np.zeros((0, length), np.int32)
        if any(block.labels is not None for block in blocks):
            labels = np.stack([block.ids if block.labels is None else block.labels for block in blocks])
        else:
            labels = None
        if any(block.position_ids is not None for block in blocks):
            positions = np.stack([_positions(block) for block in blocks])
        else:
            positions = None
        return cls(ids, labels, positions)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return _item(
            self.ids[index],
            self.ids[index] if self.labels is None else self.labels[index],
            None if self.position_ids is None else self.position_ids[index],
        )


class BlockStream(IterableDataset[dict[str, Tensor]]):
    """Blocks packed while the corpus is read, pass after pass; each pass yields the same blocks in the same order.

    A resumed run can therefore find its place by skipping blocks. With several processes, Trainer reads in the first
    one and sends blocks to the others; with several loading workers, each yields its share of the blocks.
    """

    def __init__(self, blocks: Callable[[], Iterable[Block]], *, with_positions: bool) -> None:
        """Stream blocks.

        Args:
            blocks: Starts a pass over the corpus.
            with_positions: Whether items have `position_ids`.
        """
        self._blocks = blocks
        self._with_positions = with_positions

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield blocks without end.

        Raises:
            InvalidArgumentError: A pass yielded no block, or examples follow after plain text.
        """
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        return islice(self._endless(), first, None, step)

    def _endless(self) -> Iterator[dict[str, Tensor]]:
        while True:
            block = None
            for block in self._blocks():
                if block.position_ids is not None and not self._with_positions:
                    raise InvalidArgumentError(
                        "a source that starts with plain text goes on with examples (prompts or conversations); "
                        "separate them into two sources, or turn streaming off"
                    )
                labels = block.ids if block.labels is None else block.labels
                yield _item(block.ids, labels, _positions(block) if self._with_positions else None)
            if block is None:
                raise InvalidArgumentError(
                    "the data is too small for one block; add data, or lower sequence_length or held_out"
                )


def _positions(block: Block) -> Ids:
    return np.arange(len(block.ids), dtype=np.int32) if block.position_ids is None else block.position_ids


def _item(ids: Ids, labels: Ids, position_ids: Ids | None) -> dict[str, Tensor]:
    item = {"input_ids": _tensor(ids), "labels": _tensor(labels)}
    return item if position_ids is None else {**item, "position_ids": _tensor(position_ids)}


def _tensor(values: Ids) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))
