"""Sources to blocks: blocks to train on and held-out blocks."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np

from layerskip.errors import InvalidArgumentError
from layerskip.training.data.block_datasets import BlockDataset, BlockStream
from layerskip.training.data.config import DataConfig
from layerskip.training.data.encode import BATCH_DOCUMENTS, encode_documents
from layerskip.training.data.packing import Block, LongExamples, pack
from layerskip.training.data.reading.documents import ChatDocument, Document, InstructionDocument, TextDocument
from layerskip.training.data.reading.sources import open_source, read_documents
from layerskip.training.data.split import Split, choose_split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Data to train on and to evaluate with."""

    train: BlockDataset | BlockStream
    held_out: BlockDataset
    """Held-out blocks; empty if nothing is held out."""
    num_documents: int | None
    """Documents read, held-out ones included; None with streaming."""
    num_held_out_documents: int
    """Documents, or ends of texts, that are held out; with streaming, only the ones read for `held_out`."""
    num_train_tokens: int | None
    """Tokens in the blocks to train on, without padding; None with streaming."""
    num_held_out_tokens: int
    """Tokens in the held-out blocks, without padding."""
    has_conversations: bool = False
    """Whether the data has conversations; with streaming, whether a source begins with one."""
    count_long_examples: Callable[[], LongExamples] = LongExamples
    """Counts the examples that don't fit into a block; with streaming, among the training data read so far."""


def load_corpus(
    config: DataConfig, tokenizer: "PreTrainedTokenizerBase", *, on_progress: Progress | None = None
) -> Corpus:
    """Read, split, encode and pack the sources.

    With `streaming`, only the data for the held-out blocks is read here; training reads the rest.

    Args:
        config: The sources and the blocks' length.
        tokenizer: Turns text into ids.
        on_progress: Called now and then with the number of documents encoded so far and of all; never with streaming.

    Raises:
        InvalidArgumentError: No sources, sources that can't be read or are empty, or too little text for one block.
        TokenizerError: The data has conversations, and the tokenizer no chat template that can be used for them.
    """
    if config.streaming:
        return _stream(config, tokenizer)
    return _load(config, tokenizer, on_progress or (lambda num_done, num_documents: None))


def corpus_texts(config: DataConfig) -> Iterator[str]:
    """Texts to train a tokenizer on: the training data without anything held out.

    Raises:
        InvalidArgumentError: No sources, or sources that can't be read or are empty.
    """
    documents = _Documents(config) if config.streaming else list(read_documents(config))
    split = _choose_split(documents, config)
    return (document.plain_text for document in _side(documents, split, held_out=False))


def _load(config: DataConfig, tokenizer: "PreTrainedTokenizerBase", on_progress: Progress) -> Corpus:
    documents = list(read_documents(config))
    split = _choose_split(documents, config)
    train_side = list(_side(documents, split, held_out=False))
    held_out_side = list(_side(documents, split, held_out=True))
    num_parts = len(train_side) + len(held_out_side)

    def reported(parts: list[Document], num_before: int) -> Iterator[Document]:
        for num_done, part in enumerate(parts, num_before):
            if num_done % BATCH_DOCUMENTS == 0:
                on_progress(num_done, num_parts)
            yield part

    long_examples = LongExamples()
    train = list(_blocks(reported(train_side, 0), config, tokenizer, long_examples))
    ends = reported(held_out_side, len(train_side))
    held_out = list(_blocks(ends, config, tokenizer, long_examples, keep_text=True))
    on_progress(num_parts, num_parts)
    if not train:
        raise _too_small(config, long_examples)
    # Spread over all held-out blocks, because the first ones may be all of one kind.
    chosen = np.linspace(0, len(held_out) - 1, min(len(held_out), _most_blocks(config))).round().astype(int)
    held_out = [held_out[index] for index in chosen]
    return Corpus(
        train=BlockDataset.from_blocks(train, config.sequence_length),
        held_out=BlockDataset.from_blocks(held_out, config.sequence_length),
        num_documents=len(documents),
        num_held_out_documents=len(held_out_side),
        num_train_tokens=sum(block.num_tokens for block in train),
        num_held_out_tokens=sum(block.num_tokens for block in held_out),
        has_conversations=any(map(_is_conversation, documents)),
        count_long_examples=lambda: long_examples,
    )


def _stream(config: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> Corpus:
    documents = _Documents(config)
    split = _choose_split(documents, config)
    num_held_out = 0

    def counted() -> Iterator[Document]:
        nonlocal num_held_out
        for document in _side(documents, split, held_out=True):
            num_held_out += 1
            yield document

    blocks = _blocks(counted(), config, tokenizer, LongExamples(), keep_text=True) if split.share else iter(())
    held_out = list(islice(blocks, _most_blocks(config)))
    one_pass = _TrainingPass(config=config, tokenizer=tokenizer, split=split)
    if next(iter(one_pass()), None) is None:
        raise _too_small(config, one_pass.long_examples())
    firsts = _first_documents(config)
    return Corpus(
        train=BlockStream(one_pass, with_positions=not all(isinstance(first, TextDocument) for first in firsts)),
        held_out=BlockDataset.from_blocks(held_out, config.sequence_length),
        num_documents=None,
        num_held_out_documents=num_held_out,
        num_train_tokens=None,
        num_held_out_tokens=sum(block.num_tokens for block in held_out),
        has_conversations=any(map(_is_conversation, firsts)),
        count_long_examples=one_pass.long_examples,
    )


@dataclass(frozen=True)
class _Documents:
    """Documents that are read again each time they are asked for."""

    config: DataConfig

    def __iter__(self) -> Iterator[Document]:
        return read_documents(self.config)


@dataclass(frozen=True, kw_only=True)
class _TrainingPass:
    """Starts a pass over the training data; an object, because loading workers receive it pickled."""

    config: DataConfig
    tokenizer: "PreTrainedTokenizerBase"
    split: Split
    _counts: list[LongExamples] = field(default_factory=lambda: [LongExamples()])
    """Counts of the pass that has read most so far, and of the present one."""

    def __call__(self) -> Iterator[Block]:
        self._counts[:] = [self.long_examples(), LongExamples()]
        documents = _side(_Documents(self.config), self.split, held_out=False)
        return _blocks(documents, self.config, self.tokenizer, self._counts[-1])

    def long_examples(self) -> LongExamples:
        """Counts of the pass that has read most so far."""
        return max(self._counts, key=lambda counts: counts.num_examples)


def _choose_split(documents: Iterable[Document], config: DataConfig) -> Split:
    remaining = iter(documents)
    first = next(remaining, None)
    if first is None:
        raise InvalidArgumentError(f"there is no text in {', '.join(config.data)}; name data with text")
    return choose_split(chain([first], remaining), config.held_out)


def _side(documents: Iterable[Document], split: Split, *, held_out: bool) -> Iterator[Document]:
    for document in documents:
        yield from (part for part, is_held_out in split.divide(document) if is_held_out == held_out)


def _blocks(
    documents: Iterable[Document],
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    long_examples: LongExamples,
    *,
    keep_text: bool = False,
) -> Iterator[Block]:
    # Any padding token will do: padding comes last, isn't learned, and is an example of its own.
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(i, int)), 0)
    encoded = encode_documents(documents, tokenizer)
    return pack(encoded, config.sequence_length, pad, keep_text=keep_text, long_examples=long_examples)


def _first_documents(config: DataConfig) -> list[Document]:
    """The first document of each source, because all items of a stream must have the same keys."""
    firsts = (next(open_source(spec, config)(), None) for spec in config.data)
    return [first for first in firsts if first is not None]


def _is_conversation(document: Document) -> bool:
    return isinstance(document, ChatDocument | InstructionDocument)


def _most_blocks(config: DataConfig) -> int:
    return max(1, config.eval_tokens // config.sequence_length)


def _too_small(config: DataConfig, long_examples: LongExamples) -> InvalidArgumentError:
    if long_examples.num_left_out:
        return InvalidArgumentError(
            f"{', '.join(config.data)}: nothing is left to train on: {long_examples.describe(config.sequence_length)}; "
            f"raise sequence_length to {long_examples.longest} to keep all of them"
        )
    return InvalidArgumentError(
        f"{', '.join(config.data)}: too little to train on for one block of {config.sequence_length} tokens; add data, "
        "or lower sequence_length or held_out"
    )
