"""Documents -> token ids, and which of them are learned."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from layerskip.training.data.chat import encode_chat
from layerskip.training.data.reading.documents import (
    ChatDocument,
    CompletionDocument,
    Document,
    InstructionDocument,
    TextDocument,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_DOCUMENTS = 64
PIECE_CHARACTERS = 1 << 20
"""Longest text given to the tokenizer at once: it needs some hundred bytes a token, and threads work on whole texts."""


@dataclass(frozen=True, kw_only=True)
class EncodedDocument:
    """Token ids of a document."""

    ids: list[int]
    learned: list[bool] | None = None
    """Whether each token counts in the loss; None for a plain text, where all do."""
    origin: str = ""
    """Of the document, for messages about an example."""


def encode_document(document: Document, tokenizer: "PreTrainedTokenizerBase") -> list[EncodedDocument]:
    """Token ids of one document, with the tokens of beginning and end where the tokenizer has them, each once.

    Of a prompt and its completion, the completion and the end are learned; of a conversation, what the assistant says
    and the token that ends its turn. A conversation can be several, see `encode_chat`.

    Raises:
        TokenizerError: A conversation, and the tokenizer has no chat template or one that hides the assistant's turns.
        InvalidArgumentError: A conversation that the chat template refuses.
    """
    match document:
        case TextDocument():
            return _encode_texts([document], tokenizer)
        case CompletionDocument():
            return [_encode_completion(document, tokenizer)]
        case InstructionDocument():
            return encode_document(document.conversation if tokenizer.chat_template else document.completion, tokenizer)
        case ChatDocument():
            examples = encode_chat(document, tokenizer)
            return [EncodedDocument(ids=ids, learned=learned, origin=document.origin) for ids, learned in examples]


def encode_documents(documents: Iterable[Document], tokenizer: "PreTrainedTokenizerBase") -> Iterator[EncodedDocument]:
    """What `encode_document` gives for each document, in order; texts go to the tokenizer together, which is faster."""
    remaining = iter(documents)
    while batch := list(islice(remaining, BATCH_DOCUMENTS)):
        texts = iter(_encode_texts([document for document in batch if isinstance(document, TextDocument)], tokenizer))
        for document in batch:
            if isinstance(document, TextDocument):
                yield next(texts)
            else:
                yield from encode_document(document, tokenizer)


def _encode_texts(documents: list[TextDocument], tokenizer: "PreTrainedTokenizerBase") -> list[EncodedDocument]:
    pieces = [list(_pieces(document.text)) for document in documents]
    encoded = iter(_token_ids([piece for of_document in pieces for piece in of_document], tokenizer))
    return [_as_text([token for _ in of_document for token in next(encoded)], tokenizer) for of_document in pieces]


def _as_text(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> EncodedDocument:
    return EncodedDocument(ids=[*_start(ids, tokenizer), *ids, *_end(ids, tokenizer)])


def _encode_completion(document: CompletionDocument, tokenizer: "PreTrainedTokenizerBase") -> EncodedDocument:
    prompt, completion, both = _token_ids([document.prompt, document.completion, document.plain_text], tokenizer)
    # Apart, as a model meets them when it is asked. A tokenizer that marks beginnings of texts would see a second
    # beginning in the completion; where the prompt's tokens are the same in the whole, the whole is right for both.
    if both[: len(prompt)] == prompt:
        completion = both[len(prompt) :]
    given = [*_start(prompt or completion, tokenizer), *prompt]
    learned = [*completion, *_end(completion, tokenizer)]
    marks = [False] * len(given) + [True] * len(learned)
    return EncodedDocument(ids=given + learned, learned=marks, origin=document.origin)


def _start(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The token before a text, unless it is spelled out there, as in texts written for another program."""
    bos = tokenizer.bos_token_id
    return [] if bos is None or ids[:1] == [bos] else [bos]


def _end(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The token after a text, unless it is spelled out there."""
    eos = tokenizer.eos_token_id
    return [] if eos is None or ids[-1:] == [eos] else [eos]


def _token_ids(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    if not texts:
        return []
    # `verbose` warns of texts beyond the model's context, which will be cut into blocks.
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _pieces(text: str) -> Iterator[str]:
    """Cut a very long text between lines, where a word ends for every tokenizer: before a line that isn't indented."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = text.rfind("\n", start, start + PIECE_CHARACTERS) + 1
        while end > start + 1 and text[end : end + 1].isspace():
            end = text.rfind("\n", start, end - 1) + 1
        if end <= start:
            end = start + PIECE_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:]
