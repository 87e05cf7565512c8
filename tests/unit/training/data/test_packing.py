"""Blocks of one length, as arrays and as torch data sets."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from layerskip.errors import InvalidArgumentError
from layerskip.training.data.block_datasets import BlockDataset, BlockStream
from layerskip.training.data.encode import EncodedDocument
from layerskip.training.data.packing import IGNORED, Block, LongExamples, Packer, pack

PAD = 2


def text(*ids: int) -> EncodedDocument:
    return EncodedDocument(ids=list(ids))


def example(ids: list[int], num_given: int = 1) -> EncodedDocument:
    return EncodedDocument(ids=ids, learned=[index >= num_given for index in range(len(ids))])


def rows(blocks: list[Block]) -> list[list[int]]:
    return [block.ids.tolist() for block in blocks]


def test_texts_are_joined_and_cut() -> None:
    blocks = list(pack([text(5, 6, 7), text(8, 9), text(*range(10, 20))], 4, PAD))
    assert rows(blocks) == [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]  # 17, 18, 19 don't fill a block
    assert all(block.labels is None and block.position_ids is None and block.num_tokens == 4 for block in blocks)


def test_the_last_text_can_be_kept() -> None:
    *_, last = pack([text(5, 6, 7, 8, 9)], 4, PAD, keep_text=True)
    assert last.ids.tolist() == [9, PAD, PAD, PAD]
    assert last.labels is not None
    assert last.labels.tolist() == [9, IGNORED, IGNORED, IGNORED]
    assert last.num_tokens == 1
    assert rows(list(pack([text(5, 6, 7, 8)], 4, PAD, keep_text=True))) == [[5, 6, 7, 8]]


def test_examples_stay_whole_and_positions_start_anew() -> None:
    blocks = list(pack([example([5, 6, 7]), example([8, 9], 0), example([10, 11, 12, 13, 14])], 8, PAD))
    assert rows(blocks) == [[5, 6, 7, 8, 9, PAD, PAD, PAD], [10, 11, 12, 13, 14, PAD, PAD, PAD]]
    labels, positions = blocks[0].labels, blocks[0].position_ids
    assert labels is not None
    assert positions is not None
    # 8 is learned, but its only predecessor is of another example.
    assert labels.tolist() == [IGNORED, 6, 7, IGNORED, 9, IGNORED, IGNORED, IGNORED]
    assert positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert [block.num_tokens for block in blocks] == [5, 5]


def test_examples_that_fill_a_block() -> None:
    blocks = list(pack([example([5, 6]), example([7, 8]), example([9, 10, 11, 12])], 4, PAD))
    assert rows(blocks) == [[5, 6, 7, 8], [9, 10, 11, 12]]
    assert blocks[0].position_ids is not None
    assert blocks[0].position_ids.tolist() == [0, 1, 0, 1]


def test_long_examples_lose_their_end_and_may_have_nothing_left() -> None:
    documents = [example([5, 6, 7, 8, 9, 10], 2), example([11, 12, 13, 14, 15], 4), example([16], 0), example([17, 18])]
    blocks = list(pack(documents, 4, PAD))
    assert rows(blocks) == [[5, 6, 7, 8], [17, 18, PAD, PAD]]
    assert blocks[0].labels is not None
    assert blocks[0].labels.tolist() == [IGNORED, IGNORED, 7, 8]


def test_long_examples_are_counted() -> None:
    counts = LongExamples()
    long = EncodedDocument(ids=[1] * 9, learned=[False] * 2 + [True] * 6 + [False], origin="a.jsonl, line 2")
    only_an_end_that_is_not_learned = EncodedDocument(ids=[1] * 6, learned=[False, True, True, True, False, False])
    documents = [text(*range(9)), example([1, 2]), long, example([1] * 5, 4), only_an_end_that_is_not_learned]
    list(pack(documents, 4, PAD, long_examples=counts))
    assert counts == LongExamples(
        num_examples=4, num_cut=1, num_left_out=1, longest=8, longest_origin="a.jsonl, line 2"
    )
    assert counts.describe(4) == (
        "2 of 4 examples are longer than sequence_length (4 tokens): 1 lose their end, 1 are left out; the longest, "
        "a.jsonl, line 2, needs 8"
    )
    counts = LongExamples()
    list(pack(documents, 8, PAD, long_examples=counts))
    assert (counts.num_cut, counts.num_left_out, counts.describe(8)) == (0, 0, None)


def test_texts_and_examples_never_share_a_block() -> None:
    blocks = list(pack([text(5, 6, 7), example([8, 9]), text(10, 11)], 4, PAD))
    assert rows(blocks) == [[5, 6, 7, 10], [8, 9, PAD, PAD]]


def test_nothing_gives_no_blocks() -> None:
    assert list(pack([], 4, PAD, keep_text=True)) == []
    assert list(Packer(4, PAD).finish()) == []


def test_items_of_plain_text_are_their_own_labels() -> None:
    dataset = BlockDataset.from_blocks(list(pack([text(*range(5, 13))], 4, PAD)), 4)
    assert len(dataset) == 2
    item = dataset[1]
    assert set(item) == {"input_ids", "labels"}
    assert all(value.dtype == torch.int64 and value.shape == (4,) for value in item.values())
    assert item["input_ids"].tolist() == item["labels"].tolist() == [9, 10, 11, 12]
    assert dataset.ids.dtype == np.int32
    item["labels"][0] = IGNORED
    assert dataset[1]["labels"].tolist() == [9, 10, 11, 12]


def test_items_of_a_mixed_set_all_have_positions() -> None:
    blocks = list(pack([text(5, 6, 7, 8), example([9, 10])], 4, PAD))
    dataset = BlockDataset.from_blocks(blocks, 4)
    assert [item["position_ids"].tolist() for item in (dataset[0], dataset[1])] == [[0, 1, 2, 3], [0, 1, 0, 1]]
    assert dataset[0]["labels"].tolist() == [5, 6, 7, 8]
    streamed = iter(BlockStream(lambda: blocks, with_positions=True))
    for index in range(4):
        item, expected = next(streamed), dataset[index % 2]
        assert item.keys() == expected.keys()
        assert all(torch.equal(item[key], expected[key]) for key in item)


def test_an_empty_set() -> None:
    dataset = BlockDataset.from_blocks([], 4)
    assert len(dataset) == 0
    with pytest.raises(IndexError):
        dataset[0]


def test_a_stream_goes_on_and_an_empty_one_does_not() -> None:
    blocks = list(pack([text(*range(5, 13))], 4, PAD))
    stream = iter(BlockStream(lambda: blocks, with_positions=False))
    assert [next(stream)["input_ids"][0].item() for _ in range(5)] == [5, 9, 5, 9, 5]
    with pytest.raises(InvalidArgumentError, match="too small for one block"):
        next(iter(BlockStream(list, with_positions=False)))


def test_a_stream_that_turns_into_examples() -> None:
    stream = iter(BlockStream(lambda: pack([text(5, 6, 7, 8), example([9, 10])], 4, PAD), with_positions=False))
    next(stream)
    with pytest.raises(InvalidArgumentError, match="separate them into two sources, or turn streaming off"):
        next(stream)


class Blocks:
    """Six blocks; a class of its own, for workers of any start method."""

    def __call__(self) -> Any:
        return pack([text(*range(100, 124))], 4, PAD)


def test_workers_share_a_stream() -> None:
    stream = BlockStream(Blocks(), with_positions=False)
    loader = iter(torch.utils.data.DataLoader(stream, batch_size=1, num_workers=2))
    first_pass = [next(loader)["input_ids"][0, 0].item() for _ in range(6)]
    assert sorted(first_pass) == [100, 104, 108, 112, 116, 120]
    assert isinstance(pickle.loads(pickle.dumps(stream)), BlockStream)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_example_sees_another(attention: str) -> None:
    """Logits of an example in a packed block are those of the example alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.5, use_cache=False, attn_implementation=attention,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    examples = [[5, 6, 7], [8, 9, 10, 11, 12], [5, 13], [20, 21, 22, 23, 24, 25]]
    blocks = BlockDataset.from_blocks(list(pack(map(example, examples), 12, PAD)), 12)
    batch = torch.utils.data.default_collate([blocks[0], blocks[1]])
    labels = batch.pop("labels")
    with torch.no_grad():
        packed = model(**batch).logits
        joined = model(batch["input_ids"]).logits  # as if the block were one text
        alone = [model(torch.tensor([ids])).logits[0] for ids in examples]
        loss = model(**batch, labels=labels).loss
    torch.testing.assert_close(packed[0, :10], torch.cat(alone[:3]), atol=1e-5, rtol=0)
    torch.testing.assert_close(packed[1, :6], alone[3], atol=1e-5, rtol=0)
    assert (joined[0, 3:8] - alone[1]).abs().max() > 1e-2
    losses = [
        torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
        for logits, ids in zip(alone, examples, strict=True)
    ]
    torch.testing.assert_close(loss, torch.cat(losses).mean(), atol=1e-5, rtol=0)
