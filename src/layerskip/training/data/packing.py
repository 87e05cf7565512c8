"""Encoded documents to blocks of one length.

Plain texts are joined, and the joined text is cut into blocks. Examples (prompts with completions, conversations) stay
whole: a block gets as many as fit, and the rest of it is padding. `position_ids` start at 0 with each example; from
them transformers makes a mask in which no example attends to another.

T = tokens in a block.
"""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from layerskip.training.data.encode import EncodedDocument

IGNORED = -100
"""Label of a token that isn't learned; transformers shifts labels by itself."""
Ids = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True, kw_only=True)
class Block:
    """One row of a training batch."""

    ids: Ids  # [T]
    labels: Ids | None = None  # [T]; None where each token is its own label
    position_ids: Ids | None = None  # [T]; None where they count up from 0
    num_tokens: int
    """Tokens that aren't padding."""


@dataclass(kw_only=True)
class LongExamples:
    """Counts of examples that don't fit into a block."""

    num_examples: int = 0
    """Examples with at least one learned token."""
    num_cut: int = 0
    """Examples whose end isn't learned."""
    num_left_out: int = 0
    """Examples of which nothing is learned, because the prompt alone fills a block."""
    longest: int = 0
    """Tokens of the longest example."""
    longest_origin: str = ""

    def add(self, document: EncodedDocument, learned: np.ndarray[Any, np.dtype[np.bool_]], length: int) -> None:
        """Count an example; `learned` are the marks of all its tokens."""
        if not learned.any():
            return
        self.num_examples += 1
        size = int(np.flatnonzero(learned)[-1]) + 1
        if size > self.longest:
            self.longest, self.longest_origin = size, document.origin
        if size > length:
            self.num_cut += bool(learned[:length].any())
            self.num_left_out += not learned[:length].any()

    def describe(self, length: int) -> str | None:
        """One sentence on the examples that don't fit into blocks of this length; None if all do."""
        if not self.num_cut + self.num_left_out:
            return None
        return (
            f"{self.num_cut + self.num_left_out} of {self.num_examples} examples are longer than sequence_length "
            f"({length} tokens): {self.num_cut} lose their end, {self.num_left_out} are left out; "
            f"the longest, {self.longest_origin}, needs {self.longest}"
        )


class Packer:
    """Packs documents in their order; texts and examples never share a block."""

    def __init__(self, length: int, pad_token_id: int, long_examples: LongExamples | None = None) -> None:
        """Start with an empty block.

        Args:
            length: Tokens in a block.
            pad_token_id: Fills the end of a block.
            long_examples: Counts examples that are longer than a block.
        """
        self._length = length
        self._long_examples = LongExamples() if long_examples is None else long_examples
        self._pad = pad_token_id
        self._text = array("i")
        self._examples: list[Ids] = []
        self._labels: list[Ids] = []

    def add(self, document: EncodedDocument) -> Iterator[Block]:
        """Take one more document; yield the blocks that are full."""
        if document.learned is None:
            yield from self._add_text(document.ids)
        else:
            yield from self._add_example(document, np.array(document.learned, dtype=bool))

    def finish(self, *, keep_text: bool = False) -> Iterator[Block]:
        """Yield the last block of examples, if there is one, and drop the text that doesn't fill a block.

        Args:
            keep_text: Pad the last text instead of dropping it.
        """
        if self._examples:
            yield self._close()
        if self._text and keep_text:
            ids = np.array(self._text, dtype=np.int32)
            yield Block(ids=self._fill(ids, self._pad), labels=self._fill(ids, IGNORED), num_tokens=len(ids))
        self._text = array("i")

    def _add_text(self, ids: list[int]) -> Iterator[Block]:
        self._text.extend(ids)
        num_full = len(self._text) // self._length
        for index in range(num_full):
            cut = self._text[index * self._length : (index + 1) * self._length]
            yield Block(ids=np.array(cut, dtype=np.int32), num_tokens=self._length)
        del self._text[: num_full * self._length]

    def _add_example(self, document: EncodedDocument, learned: np.ndarray[Any, np.dtype[np.bool_]]) -> Iterator[Block]:
        learned[:1] = False  # otherwise the example before would predict it
        self._long_examples.add(document, learned, self._length)
        tokens = np.array(document.ids[: self._length], dtype=np.int32)
        labels = np.where(learned[: self._length], tokens, np.int32(IGNORED))
        if not (labels != IGNORED).any():
            return
        if sum(map(len, self._examples)) + len(tokens) > self._length:
            yield self._close()
        self._examples.append(tokens)
        self._labels.append(labels)

    def _close(self) -> Block:
        tokens, labels = np.concatenate(self._examples), np.concatenate(self._labels)
        num_padding = self._length - len(tokens)
        positions = [np.arange(size, dtype=np.int32) for size in [*map(len, self._examples), num_padding]]
        self._examples, self._labels = [], []
        return Block(
            ids=self._fill(tokens, self._pad),
            labels=self._fill(labels, IGNORED),
            position_ids=np.concatenate(positions),
            num_tokens=len(tokens),
        )

    def _fill(self, values: Ids, value: int) -> Ids:
        return np.pad(values, (0, self._length - len(values)), constant_values=value)


def pack(
    documents: Iterable[EncodedDocument],
    length: int,
    pad_token_id: int,
    *,
    keep_text: bool = False,
    long_examples: LongExamples | None = None,
) -> Iterator[Block]:
    """Blocks of all documents.

    Args:
        documents: What to pack.
        length: Tokens in a block.
        pad_token_id: Fills the end of a block.
        keep_text: Pad the last text instead of dropping it.
        long_examples: Counts examples that are longer than a block.
    """
    packer = Packer(length, pad_token_id, long_examples)
    yield from chain.from_iterable(map(packer.add, documents))
    yield from packer.finish(keep_text=keep_text)
