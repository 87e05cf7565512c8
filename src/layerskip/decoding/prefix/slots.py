"""Where the rows of an engine lie in its cache: batch after batch, those that have ended behind them.

A batch runs as one block over consecutive rows of the cache. Rows that join or leave therefore make others move, at
most one of each batch behind them.
"""

from collections.abc import Sequence

import torch

from layerskip.decoding.batch import Batch
from layerskip.decoding.prefix.blocks import BlockPool, PrefixBlocks
from layerskip.decoding.prefix.idle import LEAST_COPIED, IdlePrefixes, Prefix
from layerskip.decoding.row import Row
from layerskip.errors import InvalidArgumentError
from layerskip.model.decoder import Decoder


class Slots:
    """The cache rows of an engine, and who uses them."""

    def __init__(
        self,
        decoder: Decoder,
        max_rows: int,
        capacity: int,
        *,
        keeps_prefixes: bool = False,
        prefix_blocks: PrefixBlocks | None = None,
    ) -> None:
        """Allocate the cache.

        Args:
            decoder: The network.
            max_rows: Rows that may run at once.
            capacity: Tokens that a row can hold.
            keeps_prefixes: Keep the keys and values of rows that have ended where they are, for requests that begin
                alike.
            prefix_blocks: Keep them in blocks instead.

        Raises:
            InvalidArgumentError: Prefixes shall be kept in both ways, or the blocks' memory is too small.
            OutOfMemoryError: Cache or blocks don't fit.
        """
        if keeps_prefixes and prefix_blocks is not None:
            raise InvalidArgumentError("prefixes are kept in rows or in blocks: give keeps_prefixes or prefix_blocks")
        self._decoder, self._keeps_prefixes = decoder, keeps_prefixes
        self.cache = decoder.new_cache(max_rows, capacity)
        """Keys and values of all rows, running or idle."""
        self.prefixes = IdlePrefixes()
        """What idle rows hold."""
        self.blocks = None if prefix_blocks is None else BlockPool(self.cache, prefix_blocks)
        """What was kept of rows in blocks."""
        self.batches: list[Batch] = []
        """In the order of their rows in the cache."""
        self._users: list[Row | None] = [None] * max_rows
        """The running row that each cache row belongs to."""

    @property
    def rows(self) -> list[Row]:
        """Running rows, in the order of their cache rows."""
        return [row for batch in self.batches for row in batch.rows]

    def grow(self, max_rows: int, capacity: int) -> None:
        """Make room for so many rows of so many tokens, at least; what the rows hold stays."""
        old = self.cache
        if max_rows <= old.num_rows and capacity <= old.capacity:
            return
        self.cache = self._decoder.new_cache(max(max_rows, old.num_rows), max(capacity, old.capacity))
        with torch.inference_mode():
            self.cache.take(old)
        self._users += [None] * (self.cache.num_rows - len(self._users))
        self.settle()

    def take_memory(self) -> None:
        """Write to all memory of rows and blocks; they must be empty."""
        for buffer in self.cache.buffers:
            buffer.zero_()
        if self.blocks is not None:
            self.blocks.clear()

    @torch.inference_mode()
    def claim(self, row: Row, batch: Batch) -> int:
        """Give a row that isn't in a batch yet the best idle cache row, and put it at the end of a batch.

        Returns:
            Tokens whose keys and values that cache row holds already; the last token is always run again.
        """
        cache, tokens = self.cache, row.tokens[:-1] if row.request.reuses_prefix else []
        idle = [place for place, user in enumerate(self._users) if user is None]
        source, common = self.prefixes.match(tokens, batch.depth, self._running())
        kept = self.prefixes.get(source)
        if kept is not None and common and (len(idle) == 1 or 2 * common >= len(kept.tokens)):
            place = source  # the row goes on where the other one has ended
        elif common >= LEAST_COPIED:
            place = self.prefixes.oldest([place for place in idle if place != source])
            cache.copy_row(source, place, common)
        else:
            place, common = self.prefixes.oldest(idle), 0
        self.prefixes.remove(place)
        cache.rollback(place, common)
        self._users[place] = row
        self._append(row, batch)
        return common

    def fetch(self, row: Row) -> int:
        """Let a row begin with what blocks hold of its prompt, unless it has begun to read.

        Not when the row is claimed: until its turn comes, others may have read the same beginning, or more of it.

        Returns:
            Tokens of the row that are read or needn't be.
        """
        place = self._users.index(row)
        begun = self.cache.lengths[place] > row.recorder.cached_tokens
        if self.blocks is None or begun or not row.request.reuses_prefix:
            return self.cache.lengths[place]
        row.recorder.cached_tokens = self.blocks.fetch(row.tokens, self.cache, place)
        return row.recorder.cached_tokens

    def finds_more(self, row: Row, others: Sequence[Row]) -> bool:
        """Whether a row that waits until others have read their prompts can begin with more of them than it has."""
        place = self._users.index(row)
        known = row.recorder.cached_tokens
        if self.blocks is None or self.cache.lengths[place] > known or not row.request.reuses_prefix:
            return False
        size, tokens = self.blocks.block_tokens, row.tokens[:-1]
        for other in others:
            beginning = min(len(tokens), len(other.tokens), known + size) // size * size
            if beginning > known and other.request.reuses_prefix and tokens[:beginning] == other.tokens[:beginning]:
                return True
        return False

    def keep_prompt(self, row: Row, batch: Batch) -> None:
        """Share a prompt that has been read to its end, if there are blocks for it."""
        if self.blocks is not None:
            if row.request.reuses_prefix:
                self.blocks.count(row.prompt_length, row.recorder.cached_tokens)
            self._keep(row, batch)

    def move(self, row: Row, batch: Batch, to: Batch) -> None:
        """Move a row from one batch to the end of one before it."""
        batch.rows.remove(row)
        self._append(row, to, batch)

    def remove(self, row: Row, batch: Batch) -> None:
        """Take a row out of its batch; the last row takes its place, and what it held stays, if prefixes are kept."""
        self._keep(row, batch)
        place, index = self._users.index(row), batch.rows.index(row)
        batch.rows[index] = batch.rows[-1]
        batch.rows.pop()
        self._users[place] = None
        if self._keeps_prefixes:
            tokens = row.tokens[: self.cache.lengths[place]]
            self.prefixes.put(place, Prefix(tokens=tokens, num_layers=batch.depth))

    def forget_from(self, row: Row, length: int) -> None:
        """Forget the keys and values of a row's tokens from `length` on."""
        place = self._users.index(row)
        self.cache.rollback(place, min(self.cache.lengths[place], max(0, length)))

    @torch.inference_mode()
    def settle(self) -> None:
        """Bring the rows of each batch together after rows have come, moved or gone."""
        self.batches = [batch for batch in self.batches if batch.rows]
        for place, row in enumerate(self.rows):
            if self._users[place] is not row:
                self._swap(place, self._users.index(row))
        start = 0
        for batch in self.batches:
            batch.place(self.cache.view(start, start + batch.num_rows))
            start += batch.num_rows

    def _keep(self, row: Row, batch: Batch) -> None:
        """Put what a row holds into blocks, if there are any; rows that don't run all layers have nothing to give."""
        if self.blocks is not None and batch.depth == self._decoder.num_layers:
            place = self._users.index(row)
            self.blocks.keep(row.tokens[: self.cache.lengths[place]], self.cache, place)

    def _append(self, row: Row, batch: Batch, source: Batch | None = None) -> None:
        """Add a row that comes from behind, or from the batch `source`: batches between move their first row back."""
        places = {id(other): place for place, other in enumerate(self.batches)}
        last = len(self.batches) if source is None else places[id(source)]
        for other in self.batches[places[id(batch)] + 1 : last]:
            other.rows.append(other.rows.pop(0))
        batch.rows.append(row)

    def _running(self) -> dict[int, Prefix]:
        """What running rows hold, by cache row."""
        if not self._keeps_prefixes:
            return {}
        depths = {id(row): batch.depth for batch in self.batches for row in batch.rows}
        return {
            place: Prefix(tokens=user.tokens[: self.cache.lengths[place]], num_layers=depths[id(user)])
            for place, user in enumerate(self._users)
            if user is not None
        }

    def _swap(self, place: int, other: int) -> None:
        """Exchange two cache rows; the contents of one that nobody needs any more aren't kept."""
        if self._users[place] is None and self.prefixes.get(place) is None:
            self.cache.copy_row(other, place, self.cache.lengths[other])
        else:
            self.cache.swap_rows(place, other)
        self.prefixes.swap(place, other)
        self._users[place], self._users[other] = self._users[other], self._users[place]
