"""From sources to blocks: what is trained on, what is held out, all at once and as a stream."""

import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from layerskip.errors import InvalidArgumentError, TokenizerError
from layerskip.training.data.block_datasets import BlockDataset, BlockStream
from layerskip.training.data.config import DataConfig
from layerskip.training.data.corpus import Corpus, corpus_texts, load_corpus
from layerskip.training.data.reading.sources import read_documents
from layerskip.training.data.split import is_held_out

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def load(tokenizer: Any, *data: str, **options: Any) -> Corpus:
    return load_corpus(DataConfig(data=data, **{"sequence_length": 16, **options}), tokenizer)


def items(dataset: Any) -> list[Any]:
    return [dataset[index] for index in range(len(dataset))]


def text_of(dataset: Any, tokenizer: Any) -> str:
    """What is learned in all blocks, padding aside."""
    return str(tokenizer.decode([token for item in items(dataset) for token in item["labels"].tolist() if token >= 0]))


def pairs(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{n} + 1 = ", "completion": f"{n + 1}"} for n in range(count)]


def test_documents_go_to_the_side_of_their_hash(tokenizer: Any, many_texts: str) -> None:
    corpus = load(tokenizer, many_texts, held_out=0.2)
    documents = list(read_documents(DataConfig(data=(many_texts,))))
    held_out = [document for document in documents if is_held_out(document, 0.2)]
    assert isinstance(corpus.train, BlockDataset)
    assert 5 < len(held_out) < 25
    assert (corpus.num_documents, corpus.num_held_out_documents) == (60, len(held_out))
    found = text_of(corpus.held_out, tokenizer)
    assert found == "".join(f"<s>{document.plain_text}</s>" for document in held_out)
    trained = text_of(corpus.train, tokenizer)
    expected = "".join(f"<s>{d.plain_text}</s>" for d in documents if not is_held_out(d, 0.2))
    assert expected.startswith(trained)
    assert corpus.num_train_tokens == len(corpus.train) * 16
    assert len(tokenizer(expected, add_special_tokens=False).input_ids) - corpus.num_train_tokens < 16
    assert corpus.num_held_out_tokens == len(tokenizer(found, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_copy_of_what_is_held_out_is_not_trained_on(
    tokenizer: Any, many_texts: str, tmp_path: Path, streaming: bool
) -> None:
    copies = tmp_path / "copies"
    copies.mkdir()
    for path in sorted(Path(many_texts).iterdir()):
        (copies / path.name).write_text(path.read_text().rstrip() + "  \n\n")
    config = DataConfig(data=(many_texts, str(copies)), held_out=0.2, streaming=streaming)
    trained = [text.rstrip() for text in corpus_texts(config)]
    assert len(trained) == len(set(trained)) < 60
    held_out = [d for d in read_documents(DataConfig(data=(many_texts,))) if is_held_out(d, 0.2)]
    assert not set(trained) & {document.plain_text.rstrip() for document in held_out}
    assert len(trained) + len(held_out) == 60


def test_a_single_file_loses_its_end_to_the_evaluation(tokenizer: Any, tmp_path: Path) -> None:
    lines = [f"line {number} of the old man\n" for number in range(200)]
    (tmp_path / "book.txt").write_text("".join(lines))
    corpus = load(tokenizer, str(tmp_path / "book.txt"), held_out=0.1)
    held_out = text_of(corpus.held_out, tokenizer)
    assert held_out == "<s>" + "".join(lines[180:]) + "</s>"
    assert text_of(corpus.train, tokenizer) in "<s>" + "".join(lines[:180]) + "</s>"
    assert (corpus.num_documents, corpus.num_held_out_documents) == (1, 1)
    texts = list(corpus_texts(DataConfig(data=(str(tmp_path / "book.txt"),), held_out=0.1)))
    assert texts == ["".join(lines[:180])]
    stream = load(tokenizer, str(tmp_path / "book.txt"), held_out=0.1, streaming=True)
    assert text_of(stream.held_out, tokenizer) == held_out


@pytest.mark.parametrize("streaming", [False, True])
def test_holding_out_nothing(tokenizer: Any, many_texts: str, streaming: bool) -> None:
    corpus = load(tokenizer, many_texts, held_out=0, streaming=streaming)
    assert (len(corpus.held_out), corpus.num_held_out_documents, corpus.num_held_out_tokens) == (0, 0, 0)
    assert len(list(corpus_texts(DataConfig(data=(many_texts,), held_out=0)))) == 60


@pytest.mark.parametrize("streaming", [False, True])
def test_the_evaluation_is_bounded(tokenizer: Any, many_texts: str, streaming: bool) -> None:
    everything = load(tokenizer, many_texts, held_out=0.5, streaming=streaming)
    some = load(tokenizer, many_texts, held_out=0.5, eval_tokens=50, streaming=streaming)
    assert len(everything.held_out) > 10
    last = len(everything.held_out) - 1
    # Three blocks are read at most: of a stream the first ones, else such as are spread over all of them.
    chosen = [0, 1, 2] if streaming else [0, round(last / 2), last]
    assert some.held_out.ids.tolist() == everything.held_out.ids[chosen].tolist()
    assert some.num_held_out_tokens == sum(len(item["labels"][item["labels"] >= 0]) for item in items(some.held_out))
    assert len(load(tokenizer, many_texts, held_out=0.5, eval_tokens=1, streaming=streaming).held_out) == 1


@pytest.mark.parametrize("kind", ["text", "pairs", "chat", "mixed"])
def test_a_stream_is_the_same_blocks_in_the_same_order(
    tokenizer: Any, many_texts: str, write_jsonl: Any, kind: str
) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    chats = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]}
        for n in range(30)
    ]  # fmt: skip
    data = {
        "text": [many_texts],
        "pairs": [write_jsonl(*pairs(40), name="pairs.jsonl")],
        "chat": [write_jsonl(*chats, name="chats.jsonl")],
        "mixed": [many_texts, str(Path(many_texts).parent / "pairs.jsonl")],
    }[kind]
    whole = load(tokenizer, *data, held_out=0.2, sequence_length=32)
    stream = load(tokenizer, *data, held_out=0.2, sequence_length=32, streaming=True)
    assert isinstance(whole.train, BlockDataset)
    assert isinstance(stream.train, BlockStream)
    assert (stream.num_documents, stream.num_train_tokens) == (None, None)
    assert len(whole.train) > 3
    for number, item in enumerate(islice(stream.train, 2 * len(whole.train))):  # the second pass is like the first
        expected = whole.train[number % len(whole.train)]
        assert item.keys() == expected.keys()
        assert ("position_ids" in item) == (kind != "text")
        assert all(torch.equal(item[key], expected[key]) for key in item)
    assert stream.held_out.ids.tolist() == whole.held_out.ids.tolist()
    assert isinstance(pickle.loads(pickle.dumps(stream.train)), BlockStream)


def test_a_stream_reads_no_more_than_it_needs(tokenizer: Any, tmp_path: Path) -> None:
    """A broken record far behind doesn't matter to a stream that isn't read so far."""
    lines = [f'{{"text": "record {number} of the old man"}}\n' for number in range(2000)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join([*lines, "broken\n"]))
    stream = load(tokenizer, str(path), held_out=0.2, eval_tokens=16, streaming=True)
    assert isinstance(stream.train, BlockStream)
    next(iter(stream.train))
    with pytest.raises(InvalidArgumentError, match="line 2001 is not JSON"):
        load(tokenizer, str(path), held_out=0.2)


def test_examples_learn_completions_only(tokenizer: Any, write_jsonl: Any) -> None:
    path = write_jsonl(*pairs(30))
    corpus = load(tokenizer, path, held_out=0)
    assert isinstance(corpus.train, BlockDataset)
    assert text_of(corpus.train, tokenizer) == "".join(f"{n + 1}</s>" for n in range(30))
    assert set(corpus.train[0]) == {"input_ids", "labels", "position_ids"}
    assert list(corpus_texts(DataConfig(data=(path,), held_out=0)))[:2] == ["0 + 1 = 1", "1 + 1 = 2"]


def test_conversations_need_a_template(tokenizer: Any, write_jsonl: Any) -> None:
    path = write_jsonl({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    assert list(corpus_texts(DataConfig(data=(path,), held_out=0))) == ["a\nb"]
    with pytest.raises(TokenizerError, match="no chat template"):
        load(tokenizer, path, held_out=0)


def test_a_tokenizer_without_padding(tokenizer: Any, write_jsonl: Any) -> None:
    tokenizer.pad_token = None
    corpus = load(tokenizer, write_jsonl(*pairs(1)), held_out=0, sequence_length=64)
    assert isinstance(corpus.train, BlockDataset)
    assert corpus.train[0]["input_ids"][-1] == tokenizer.eos_token_id
    assert corpus.train[0]["labels"][-1] == -100


@pytest.mark.parametrize("streaming", [False, True])
def test_errors(tokenizer: Any, tmp_path: Path, many_texts: str, write_jsonl: Any, streaming: bool) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("\n")
    cases = [
        ((), {}, "no data was named"),
        ((str(tmp_path / "empty"),), {}, "there is no text in .*empty; name data with text"),
        ((str(tmp_path / "blank.txt"),), {}, "there is no text in .*blank"),
        (
            (many_texts,),
            {"sequence_length": 100_000},
            "too little to train on for one block of 100000 tokens; add data",
        ),
        (
            (write_jsonl(*pairs(1)),),
            {"held_out": 0.1},
            "all examples have the same prompt; add data",
        ),
    ]
    for data, options, message in cases:
        with pytest.raises(InvalidArgumentError, match=message):
            load(tokenizer, *data, **{"streaming": streaming, **options})


def test_progress_counts_documents(tokenizer: Any, write_jsonl: Any) -> None:
    calls: list[tuple[int, int]] = []
    config = DataConfig(data=(write_jsonl(*pairs(200)),), sequence_length=32)
    load_corpus(config, tokenizer, on_progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (200, 200)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert {total for _, total in calls} == {200}
    assert len(calls) > 2


@pytest.mark.parametrize("streaming", [False, True])
def test_examples_longer_than_a_block_are_counted(tokenizer: Any, write_jsonl: Any, streaming: bool) -> None:
    records = [
        *pairs(20),
        {"prompt": "the old " * 40, "completion": "cat"},
        {"prompt": "a", "completion": "boat " * 40},
    ]
    corpus = load(tokenizer, write_jsonl(*records), held_out=0, sequence_length=32, streaming=streaming)
    if streaming:  # as it is read, however often
        assert isinstance(corpus.train, BlockStream)
        list(islice(corpus.train, 40))
    counts = corpus.count_long_examples()
    assert (counts.num_examples, counts.num_cut, counts.num_left_out) == (22, 1, 1)
    assert counts.longest_origin.endswith("line 21, prompt")
    assert len(load(tokenizer, write_jsonl(records[20]), held_out=0, sequence_length=counts.longest).train) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_all_examples_longer_than_a_block(tokenizer: Any, write_jsonl: Any, streaming: bool) -> None:
    path = write_jsonl(*({"prompt": "the old cat " * size, "completion": "x"} for size in (30, 60)))
    with pytest.raises(InvalidArgumentError) as caught:
        load(tokenizer, path, held_out=0, sequence_length=16, streaming=streaming)
    needed = load(tokenizer, path, held_out=0, sequence_length=500).count_long_examples().longest
    assert str(caught.value) == (
        f"{path}: nothing is left to train on: 2 of 2 examples are longer than sequence_length (16 tokens): 0 lose "
        f"their end, 2 are left out; the longest, {path}, line 2, prompt, needs {needed}; raise sequence_length to "
        f"{needed} to keep all of them"
    )
