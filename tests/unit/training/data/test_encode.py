"""Token ids of documents, and which of them are learned."""

from typing import Any

import pytest

from layerskip.errors import InvalidArgumentError, TokenizerError
from layerskip.training.data import encode
from layerskip.training.data.encode import EncodedDocument, encode_documents
from layerskip.training.data.encode import encode_document as encode_all
from layerskip.training.data.reading.documents import ChatDocument, CompletionDocument, Document, TextDocument
from layerskip.training.data.tokenizer import train_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '[' + message['role'] + ']' }}{% if message['role'] == 'assistant' %}"
    "{%- generation -%}{{ message['content'] + '</s>' }}{%- endgeneration -%}{% else %}{{ message['content'] }}"
    "{% endif %}{% endfor %}"
)
# As some reasoning models do: what was said earlier is shortened.
FORGETFUL = (
    "{% for message in messages %}{{ '[' + message['role'] + ']' }}{% if loop.last %}{{ '(thinks)' }}{% endif %}"
    "{{ message['content'] + '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def text(content: str) -> TextDocument:
    return TextDocument(origin="a.txt", text=content)


def pair(prompt: str, completion: str) -> CompletionDocument:
    return CompletionDocument(origin="a.jsonl, line 1", prompt=prompt, completion=completion)


def chat(*turns: tuple[str, str]) -> ChatDocument:
    return ChatDocument(
        origin="a.jsonl, line 1", messages=tuple({"role": role, "content": content} for role, content in turns)
    )


TWO_TURNS = chat(("user", "the cat"), ("assistant", " old boats\n\n"), ("user", "man"), ("assistant", "two\nnine"))


def encode_document(document: Document, tokenizer: Any) -> EncodedDocument:
    """The one example of a document."""
    (encoded,) = encode_all(document, tokenizer)
    return encoded


def learned_text(encoded: EncodedDocument, tokenizer: Any) -> list[str]:
    """Runs of learned tokens, as text."""
    assert encoded.learned is not None
    assert len(encoded.learned) == len(encoded.ids)
    runs: list[list[int]] = []
    before = False
    for token, now in zip(encoded.ids, encoded.learned, strict=True):
        if now and not before:
            runs.append([])
        if now:
            runs[-1].append(token)
        before = now
    return [tokenizer.decode(run) for run in runs]


def test_a_text_is_learned_whole_between_start_and_end(tokenizer: Any) -> None:
    encoded = encode_document(text("the cat"), tokenizer)
    assert encoded.learned is None
    assert (encoded.ids[0], encoded.ids[-1]) == (0, 1)
    assert encoded.ids[1:-1] == tokenizer("the cat", add_special_tokens=False).input_ids


def test_start_and_end_that_are_spelled_out_are_not_doubled(tokenizer: Any) -> None:
    assert encode_document(text("<s>the cat</s>"), tokenizer) == encode_document(text("the cat"), tokenizer)
    assert encode_document(pair("<s>a", "b</s>"), tokenizer) == encode_document(pair("a", "b"), tokenizer)


def test_a_tokenizer_without_start_and_end(tokenizer: Any) -> None:
    tokenizer.bos_token = tokenizer.eos_token = None
    assert tokenizer.decode(encode_document(text("the cat"), tokenizer).ids) == "the cat"
    encoded = encode_document(pair("a ", "cat"), tokenizer)
    assert tokenizer.decode(encoded.ids) == "a cat"
    assert learned_text(encoded, tokenizer) == ["cat"]


def test_of_a_pair_the_completion_and_the_end_are_learned(tokenizer: Any) -> None:
    encoded = encode_document(pair("the old", " cat"), tokenizer)
    assert tokenizer.decode(encoded.ids) == "<s>the old cat</s>"
    assert learned_text(encoded, tokenizer) == [" cat</s>"]
    empty_prompt = encode_document(pair("", "cat"), tokenizer)
    assert tokenizer.decode(empty_prompt.ids) == "<s>cat</s>"
    assert learned_text(empty_prompt, tokenizer) == ["cat</s>"]


def test_a_prompt_has_the_tokens_it_has_alone(tokenizer: Any) -> None:
    prompt = tokenizer("the ol", add_special_tokens=False).input_ids
    assert tokenizer("the old", add_special_tokens=False).input_ids[: len(prompt)] != prompt, "no merge to test with"
    encoded = encode_document(pair("the ol", "d"), tokenizer)
    assert encoded.ids[1 : 1 + len(prompt)] == prompt
    assert learned_text(encoded, tokenizer) == ["d</s>"]


def test_a_completion_is_no_second_beginning() -> None:
    """Tokenizers as Llama 2's put a space before a text, but not before its continuation."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "▁the", "▁cat", "▁", "cat", "\n"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Split("\n", "isolated")]
    )
    backend.decoder = decoders.Metaspace()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    encoded = encode_document(pair("the\n", "cat"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(encoded.ids) == ["<s>", "▁the", "\n", "cat", "</s>"]
    assert encoded.learned == [False, False, False, True, True]


@pytest.mark.parametrize("template", [CHATML, PLAIN])
def test_of_a_chat_the_assistant_is_learned(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    encoded = encode_document(TWO_TURNS, tokenizer)
    assert tokenizer.decode(encoded.ids) == tokenizer.apply_chat_template(list(TWO_TURNS.messages), tokenize=False)
    runs = learned_text(encoded, tokenizer)
    if template == CHATML:  # the line break after the end token is the template's
        assert runs == [" old boats\n\n<|im_end|>", "two\nnine<|im_end|>"]
    else:
        assert runs == ["  old boats\n\n\n", " two\nnine\n"]


def test_a_space_of_the_prompt_is_not_learned(tokenizer: Any) -> None:
    """Some tokenizers leave spaces out of offsets; that of a lone one is empty then, and lies where the turn begins."""
    from tokenizers import processors

    tokenizer.chat_template = PLAIN.replace(": '", ":  '").replace("assistant:'", "assistant:  '")
    document = chat(("user", "a"), ("assistant", "\tcat"))
    for trim in (False, True):
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
        assert learned_text(encode_document(document, tokenizer), tokenizer) == ["\tcat\n"]


def test_marked_templates_say_what_is_learned(tokenizer: Any) -> None:
    tokenizer.chat_template = MARKED
    encoded = encode_document(TWO_TURNS, tokenizer)
    assert (
        tokenizer.decode(encoded.ids) == "[user]the cat[assistant] old boats\n\n</s>[user]man[assistant]two\nnine</s>"
    )
    assert learned_text(encoded, tokenizer) == [" old boats\n\n</s>", "two\nnine</s>"]


def test_marked_templates_take_conversations_that_start_with_the_assistant(tokenizer: Any) -> None:
    first = chat(("assistant", "cat"), ("user", "a"), ("assistant", "man"))
    tokenizer.chat_template = MARKED
    assert learned_text(encode_document(first, tokenizer), tokenizer) == ["cat</s>", "man</s>"]
    tokenizer.chat_template = PLAIN
    with pytest.raises(InvalidArgumentError, match=r"line 1 starts with the assistant.*remove its first message"):
        encode_document(first, tokenizer)


def test_a_template_that_rewrites_earlier_turns(tokenizer: Any) -> None:
    tokenizer.chat_template = FORGETFUL
    first, second = encode_all(TWO_TURNS, tokenizer)
    assert tokenizer.decode(first.ids) == "[user](thinks)the cat</s>[assistant](thinks) old boats\n\n</s>"
    assert learned_text(first, tokenizer) == ["(thinks) old boats\n\n</s>"]
    assert tokenizer.decode(second.ids) == (
        "[user]the cat</s>[assistant] old boats\n\n</s>[user](thinks)man</s>[assistant](thinks)two\nnine</s>"
    )
    assert learned_text(second, tokenizer) == ["(thinks)two\nnine</s>"]


def test_no_chat_template(tokenizer: Any) -> None:
    with pytest.raises(TokenizerError, match=r"no chat template; use a model made for chat, or set .*chat_template"):
        encode_document(TWO_TURNS, tokenizer)


def test_a_template_that_refuses_a_conversation(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidArgumentError, match=r"can't be applied to a\.jsonl, line 1: roles must alternate"):
        encode_document(TWO_TURNS, tokenizer)


def test_a_tokenizer_without_offsets(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer.chat_template = PLAIN
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(TokenizerError, match="use a fast tokenizer"):
        encode_document(TWO_TURNS, tokenizer)


def test_batches_give_what_single_documents_give(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "BATCH_DOCUMENTS", 3)
    tokenizer.chat_template = PLAIN
    documents: list[Document] = [text("a"), pair("b", "c"), text("the cat"), TWO_TURNS, text("man"), pair("d", "e")]
    assert list(encode_documents(documents, tokenizer)) == [encode_document(d, tokenizer) for d in documents]


def test_long_texts_are_encoded_in_pieces_to_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    content = "the old cat\n\n  sees\n\tnine boats\n  and  more\n" * 40
    tokenizer: Any = train_tokenizer([content], 400)  # has tokens of line breaks with spaces
    whole = encode_document(text(content), tokenizer)
    calls = []
    token_ids = encode._token_ids
    monkeypatch.setattr(encode, "_token_ids", lambda texts, tok: calls.append(len(texts)) or token_ids(texts, tok))
    for size in range(50, 120, 7):
        monkeypatch.setattr(encode, "PIECE_CHARACTERS", size)
        assert encode_document(text(content), tokenizer) == whole
    assert min(calls) > 10
    unbroken = "x" * 250 + "\n y" * 99
    assert tokenizer.decode(encode_document(text(unbroken), tokenizer).ids[1:-1]) == unbroken


def test_texts_beyond_the_models_context_do_not_warn(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer.model_max_length = 4
    assert len(encode_document(text("the cat sees nine boats and more"), tokenizer).ids) > 4
    assert not caplog.records
