"""The tokenizer that needs no transformers, and that it and transformers' are asked in the same words."""

import copy
import pickle
from collections.abc import Callable

import pytest
from same_tokenizers import assert_same
from tiny_tokenizers import byte_fallback, byte_level, unigram, without_transformers, word_piece
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from layerskip.text.tokenizer import TextTokenizer

KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "llama 2": lambda: byte_fallback("llama2"),
    "mistral": lambda: byte_fallback("mistral"),
    "gemma": lambda: byte_fallback("gemma"),
    "byte-level": byte_level,
    "word piece": word_piece,
    "unigram": unigram,
}


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_what_transformers_gives(kind: str, begins: bool) -> None:
    theirs = KINDS[kind]()
    if begins:
        theirs.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", theirs.bos_token_id), ("</s>", theirs.eos_token_id)]
        )
    assert_same(without_transformers(theirs), theirs)


def test_special_tokens_become_added_tokens() -> None:
    backend = Backend.from_str(byte_level().backend_tokenizer.to_str())
    size = backend.get_vocab_size()
    tokenizer = TextTokenizer(backend, special_tokens={"bos_token": "th", "pad_token": "<pad>"}, name_or_path="here")
    assert (len(tokenizer), tokenizer.name_or_path) == (size + 1, "here")
    assert tokenizer.convert_ids_to_tokens(tokenizer.all_special_ids) == ["th", "<pad>"]
    (pad,) = tokenizer.encode("<pad>")
    assert (pad, tokenizer.added_tokens_decoder[pad].special) == (size, True)
    assert tokenizer.decode([pad], skip_special_tokens=True) == ""
    assert tokenizer.decode([pad]) == "<pad>"


def test_unknown_names() -> None:
    """The id of the unknown token stands for them, and nothing where there is none."""
    tokenizer = without_transformers(byte_level())
    assert tokenizer.convert_tokens_to_ids(["<s>", "nothing"]) == [1, 0]
    del tokenizer.special_tokens_map["unk_token"]
    assert tokenizer.convert_tokens_to_ids(["<s>", "nothing"]) == [1, None]
    assert tokenizer.convert_ids_to_tokens([1, 10**6]) == ["<s>", None]


TOOLS = [{"type": "function"}]


@pytest.mark.parametrize(
    ("own", "given", "tools"),
    [
        (None, None, None),
        (None, "given", None),
        ("own", None, TOOLS),
        ("own", "given", None),
        ("", None, None),
        ({"default": "a", "tool_use": "b"}, None, None),
        ({"default": "a", "tool_use": "b"}, None, TOOLS),
        ({"default": "a", "tool_use": "b"}, "tool_use", None),
        ({"default": "a", "rag": "c"}, None, TOOLS),
        ({"default": "a", "rag": "c"}, "given", TOOLS),
        ({"rag": "c", "tool_use": "b"}, None, None),
        ({"rag": "c", "tool_use": "b"}, None, []),
    ],
)
def test_which_chat_template_applies(own: str | dict[str, str] | None, given: str | None, tools: list | None) -> None:
    theirs = byte_level()
    theirs.chat_template = own
    ours = without_transformers(theirs)
    try:
        expected = theirs.get_chat_template(given, tools)
    except ValueError:
        with pytest.raises(ValueError, match="template"):
            ours.get_chat_template(given, tools)
        return
    assert ours.get_chat_template(given, tools) == expected
    options = {"chat_template": given, "tools": tools, "tokenize": False}
    chat = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(chat, **options) == theirs.apply_chat_template(chat, **options)


def test_templates_know_the_special_tokens() -> None:
    theirs = byte_level()
    theirs.chat_template = "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ mood }}"
    ours, chat = without_transformers(theirs), [{"role": "user", "content": "hi"}]
    for more in ({}, {"mood": "!"}, {"bos_token": "<other>"}):
        expected = theirs.apply_chat_template(chat, tokenize=False, **more)
        assert ours.apply_chat_template(chat, tokenize=False, **more) == expected


def test_copies_are_independent() -> None:
    tokenizer = without_transformers(byte_level())
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        other.backend.add_tokens(["hi"])
        assert len(other) == len(tokenizer) + 1
