"""Tokenizers that are trained here."""

from pathlib import Path
from typing import Any

import pytest

from layerskip.errors import InvalidArgumentError
from layerskip.training.data.tokenizer import train_tokenizer

TEXTS = [
    "def f(x):\n    return  x + 1\n",
    "\tTabs,  spaces ,  and trailing \n\n\n",
    "Grüße, 世界 🙂 é e\u0301 \x00\x7f",
    " leading , don't ; n't 's .",
    "",
]


def test_special_tokens_and_the_start(tokenizer: Any) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<s>", "</s>", "<pad>"]
    with_start = tokenizer("the cat").input_ids
    assert with_start == [0, *tokenizer("the cat", add_special_tokens=False).input_ids]
    assert with_start.count(0) == 1


@pytest.mark.parametrize("beside_a_model", [False, True])
def test_texts_come_back_exactly_also_after_saving(tokenizer: Any, tmp_path: Path, beside_a_model: bool) -> None:
    from transformers import AutoTokenizer, LlamaConfig

    tokenizer.save_pretrained(tmp_path)
    if beside_a_model:
        LlamaConfig().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 2)
    for text in TEXTS:
        ids = loaded(text).input_ids
        assert ids == tokenizer(text).input_ids
        assert ids[0] == 0
        assert loaded.decode(ids[1:]) == text
        assert tokenizer.decode(ids[1:]) == text


def test_the_same_texts_give_the_same_tokenizer() -> None:
    texts = [f"some text number {number} about {number * 7919 % 101}" for number in range(300)]
    first, second = (train_tokenizer(iter(given), 400) for given in (texts, texts))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_frequent_words_become_tokens() -> None:
    tokenizer = train_tokenizer(["the boat the boat"] * 10, 300)
    assert len(tokenizer("the boat", add_special_tokens=False).input_ids) == 2


def test_a_small_corpus_gives_fewer_tokens() -> None:
    assert 259 < len(train_tokenizer(["abc abc"], 5000)) < 270
    assert len(train_tokenizer(["abc abc"], 259)) == 259


@pytest.mark.parametrize("size", [258, 0, -1, 300.0, True])
def test_too_small_a_vocabulary(size: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=f"vocab_size must be .* at least 259 .*got {size}"):
        train_tokenizer(["abc"], size)


def test_no_text() -> None:
    with pytest.raises(InvalidArgumentError, match="no text"):
        train_tokenizer([], 300)
