"""Prompts in every form that tokenizers and callers give them, and what is refused by name."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_tokenizers import byte_fallback, byte_level, slow
from tokenizers.processors import TemplateProcessing
from transformers import BatchEncoding, PreTrainedTokenizerBase

import layerskip
from layerskip.errors import PromptError, TokenizerError
from layerskip.language_model import LanguageModel
from layerskip.text.prompts import encode_prompts

A, B = [5, 6, 7], [8, 9]
CHAT = [{"role": "user", "content": "Hello!"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}</s>{% endfor %}"


def encode(prompts: Any, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any) -> list[list[int]]:
    def missing() -> PreTrainedTokenizerBase:
        if tokenizer is None:
            raise TokenizerError("no tokenizer")
        return tokenizer

    return encode_prompts(prompts, missing, **options)


def shown(value: object) -> str:
    """The value in a test's name, which must be the same in every process that runs tests."""
    return re.sub(" at 0x[0-9a-f]+", "", ascii(value))


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (A, [A]),
        (tuple(A), [A]),
        (range(5, 8), [A]),
        ((token for token in A), [A]),
        ([A, B], [A, B]),
        (([*prompt] for prompt in (A, B)), [A, B]),
        ([(token for token in A), tuple(B)], [A, B]),
        (torch.tensor(A), [A]),
        (torch.tensor([A, A], dtype=torch.int32), [A, A]),
        ([torch.tensor(A), torch.tensor(B)], [A, B]),
        ([torch.tensor(token) for token in A], [A]),
        (np.array(A), [A]),
        (np.array([A, A], dtype=np.uint16), [A, A]),
        ([np.array(A), B], [A, B]),
        (list(np.array(A)), [A]),
        ([list(np.array(A)), [np.int32(8), 9]], [A, B]),
        ([], []),
        ([[]], [[]]),
        ({"input_ids": A}, [A]),
        ({"input_ids": [A, B]}, [A, B]),
        ([{"input_ids": A}, {"input_ids": [B]}, A], [A, B, A]),
        (BatchEncoding({"input_ids": [A, B], "token_type_ids": [[0, 0, 0], [0, 0]]}), [A, B]),
        ({"input_ids": [0, *B], "attention_mask": [0, 1, 1]}, [B]),
        ({"input_ids": [A, [*B, 0]], "attention_mask": [[1, 1, 1], [1, 1, 0]]}, [A, B]),
        ({"input_ids": torch.tensor([A, [0, *B]]), "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}, [A, B]),
        ({"input_ids": np.array([0, *B]), "attention_mask": np.array([False, True, True])}, [B]),
        ({"input_ids": torch.tensor(A), "attention_mask": None}, [A]),
    ],
    ids=shown,
)
def test_ids_in_any_container(prompts: Any, expected: list[list[int]]) -> None:
    encoded = encode(prompts)
    assert encoded == expected
    assert all(type(token) is int for prompt in encoded for token in prompt)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (b"abc", r"prompts must be a text or a list of token ids, got bytes; decode it: \.decode\('utf-8'\)"),
        ([b"abc", "d"], "prompt 0 must be .*got bytes"),
        (bytearray(b"abc"), "got bytearray"),
        (["d", memoryview(b"abc")], "prompt 1 must be .*got memoryview"),
        (5, "prompts must be a text or a list of token ids, got 5"),
        (None, "got None"),
        (True, "got True"),
        (torch.tensor(5), "got 5"),
        (Path("a.txt"), "got a PosixPath"),
        ({5, 6}, "got a set"),
        ([{5, 6}], "prompt 0 must be .*got a set"),
        ([5, "a"], "prompt 0 must be .*got 5"),
        (["a", 5], "prompt 1 must be .*got 5"),
        ([True, False], "prompt 0 must be .*got True"),
        ([[5, True]], "prompt 0 must be .*item 1 is True; ids are whole numbers"),
        ([[5, np.bool_(True)]], "item 1 is a bool"),
        (torch.tensor([True, False]), "got True"),
        ([[5, 2.5]], "item 1 is 2.5"),
        (torch.tensor([[5.0]]), "item 0 is 5.0"),
        ([[5, "a"]], "prompt 0 must be .*item 1 is 'a'"),
        ([["a" * 99]], "item 0 is 'a{39}\\.\\.\\."),
        ([[A, B]], "prompt 0 must be .*item 0 is a list"),
        (torch.tensor([[A]]), "item 0 is a list"),
        ([None], "prompt 0 must be .*got None"),
        (
            {"attention_mask": [1]},
            r"a mapping without 'input_ids' \(it has 'attention_mask'\); give a tokenizer's output",
        ),
        ({}, "it has nothing"),
        (CHAT, r"prompt 0 is a mapping without 'input_ids' \(it has 'role', 'content'\); encode a .*encode_chat"),
        ([CHAT], "item 0 is a dict"),
        ([{"input_ids": [A, B]}], "prompt 0 holds 2 texts; give each as a prompt of its own"),
        ({"input_ids": "abc"}, "the input_ids of prompts must be .*got 'abc'"),
        ({"input_ids": ["abc"]}, "row 0 of prompts must be .*got 'abc'"),
        ({"input_ids": A, "attention_mask": [1]}, "row 0 of prompts has 3 input_ids and 1 marks of attention_mask"),
        ({"input_ids": [A, B], "attention_mask": [[1, 1, 1]]}, "2 rows of input_ids and 1 of attention_mask"),
        ("", "prompt 0 is empty"),
        (["a", ""], "prompt 1 is empty"),
        ("ab\ud83d", r"prompt 0 has half a character, '.ud83d', at position 2"),
        (["ab", "\udcff"], "prompt 1 has half a character, '.udcff', at position 0"),
    ],
    ids=shown,
)
def test_what_is_neither_text_nor_ids(prompts: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message) as error:
        encode(prompts, byte_level())
    assert "\n" not in str(error.value)
    str(error.value).encode()  # the error itself is a text


@pytest.fixture(params=["byte-level", "byte fallback"])
def fast(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """Those that put <s> in front of a text."""
    made = byte_level() if request.param == "byte-level" else byte_fallback("llama2")
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", made.bos_token_id)]
    )
    made.chat_template = TEMPLATE
    return made


class TestTokenizersOutput:
    @pytest.mark.parametrize("with_slow", [False, True])
    def test_one_text_and_several(self, fast: PreTrainedTokenizerBase, with_slow: bool) -> None:
        tokenizer = slow() if with_slow else fast  # the slow one puts </s> behind a text
        tokenizer.pad_token = "</s>"
        texts = ["hi there", "hi", "the thing, 😀"]
        expected = [tokenizer(text)["input_ids"] for text in texts]
        assert encode(texts, tokenizer) == expected
        assert encode(texts[0], tokenizer) == expected[:1]
        assert encode(tokenizer(texts)) == expected
        assert encode(tokenizer(texts[0])) == expected[:1]
        assert encode(tokenizer(texts[0], return_tensors="pt")) == expected[:1]
        for side in ("left", "right"):
            tokenizer.padding_side = side
            for kind in ("pt", "np"):
                assert encode(tokenizer(texts, padding=True, return_tensors=kind)) == expected

    def test_rendered_chats_get_no_second_beginning(self, fast: PreTrainedTokenizerBase) -> None:
        ids = fast.apply_chat_template(CHAT, return_dict=False)
        assert ids.count(fast.bos_token_id) == 1
        for rendered in (
            fast.apply_chat_template(CHAT),
            fast.apply_chat_template([CHAT], return_tensors="pt"),
            fast.apply_chat_template(CHAT, return_dict=False, return_tensors="pt"),
            fast.apply_chat_template(CHAT, tokenize=False),
            ids,
            [ids],
        ):
            assert encode(rendered, fast) == [ids]

    def test_a_text_keeps_the_beginnings_that_it_has(self, fast: PreTrainedTokenizerBase) -> None:
        bos = fast.bos_token_id
        assert encode("<s><s>hi", fast)[0][:3].count(bos) == 2
        assert encode("<s><s>hi", fast, special_tokens=False)[0][:3].count(bos) == 2
        assert encode("<s>", fast) == [[bos]]
        assert encode("hi", fast)[0][0] == bos
        assert encode("hi", fast, special_tokens=False)[0][0] != bos

    def test_repeated_letters_are_no_beginning(self) -> None:
        tokenizer = byte_level()
        assert encode("aab", tokenizer) == [tokenizer.convert_tokens_to_ids(["a", "a", "b"])]
        assert encode("<s><s>", tokenizer) == [[tokenizer.bos_token_id] * 2]


class TestEntryPoints:
    """All that take prompts take them in the same forms."""

    FORMS: tuple[Callable[[list[int]], Any], ...] = (
        lambda ids: ids,
        lambda ids: [ids],
        lambda ids: iter([iter(ids)]),
        lambda ids: torch.tensor([ids]),
        lambda ids: np.array(ids),
        lambda ids: BatchEncoding({"input_ids": [[0, *ids]], "attention_mask": [[0, *[1] * len(ids)]]}),
    )

    @pytest.mark.parametrize("form", FORMS)
    def test_they_agree(self, text_lm: LanguageModel, form: Callable[[list[int]], Any]) -> None:
        options = {"max_new_tokens": 6, "exit_layer": 3}
        assert text_lm.encode(form(A)) == [A]
        assert text_lm.generate(form(A), **options)[0].token_ids == text_lm.generate([A], **options)[0].token_ids
        (result,) = text_lm.stream(form(A), **options).run()
        assert result.token_ids == text_lm.generate([A], **options)[0].token_ids
        assert text_lm.score(form(A)) == text_lm.score([A])
        assert text_lm.score(form(A), form(B)) == text_lm.score([A], [B])
        assert torch.equal(text_lm.logits(form(A)), text_lm.logits(A))

    def test_a_text(self, text_lm: LanguageModel) -> None:
        ids = text_lm.tokenizer("ab cab")["input_ids"]
        assert text_lm.encode("ab cab") == [ids]
        options = {"max_new_tokens": 6, "exit_layer": 3}
        for given in ("ab cab", ["ab cab"], text_lm.tokenizer("ab cab"), text_lm.tokenizer(["ab cab"])):
            assert text_lm.generate(given, **options)[0].token_ids == text_lm.generate([ids], **options)[0].token_ids
        assert text_lm.score("ab", " the") == text_lm.score(["ab"], [" the"])
        assert torch.equal(text_lm.logits("ab cab"), text_lm.logits(ids))

    @pytest.mark.parametrize("prompts", [b"abc", [True], "\ud83d", ["a\udc80"], CHAT, {"ids": [1]}], ids=shown)
    def test_they_refuse_the_same(self, text_lm: LanguageModel, prompts: Any) -> None:
        for call in (text_lm.encode, text_lm.generate, text_lm.stream, text_lm.score, text_lm.logits):
            with pytest.raises(PromptError, match="prompt"):
                call(prompts)
        with pytest.raises(PromptError, match="prompt"):
            text_lm.score(["ab"], prompts)

    def test_logits_are_those_of_one_text(self, text_lm: LanguageModel) -> None:
        with pytest.raises(layerskip.LayerSkipError, match="one text; got 2"):
            text_lm.logits([A, B])

    def test_conversations_are_encoded_by_name(self, text_lm: LanguageModel) -> None:
        with pytest.raises(TokenizerError, match="no chat template"):
            text_lm.encode_chat([{"role": "user", "content": "ab"}])
        template = "<s>{% for m in messages %}{{ m.content }}</s>{% endfor %}"
        ids = text_lm.encode_chat([{"role": "user", "content": "ab"}], template=template)
        assert ids == [0, text_lm.tokenizer.convert_tokens_to_ids("a"), text_lm.tokenizer.convert_tokens_to_ids("b"), 1]
        with pytest.raises(PromptError, match="line 3 has half a character"):
            text_lm.encode_chat([{"role": "user", "content": "a\ud83d"}], template=template, name="line 3")


def test_masked_prompts_are_empty(text_lm: LanguageModel) -> None:
    with pytest.raises(PromptError, match="prompt 0 is empty"):
        text_lm.generate({"input_ids": [A], "attention_mask": [[0, 0, 0]]})
