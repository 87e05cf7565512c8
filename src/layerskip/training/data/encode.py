"""Documents to token ids, with the learned tokens marked."""

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
"""Characters of the longest text given to the tokenizer at once: it needs some hundred bytes for each token, and its
threads work on whole texts."""


@dataclass(frozen=True, kw_only=True)
class EncodedDocument:
    """Token ids of a document."""

    ids: list[int]
    learned: list[bool] | None = None
    """Whether each token counts in the loss; None for a plain text, where all do."""
    origin: str = ""
    """Where the document is from, for messages about an example."""


def encode_document(document: Document, tokenizer: "PreTrainedTokenizerBase") -> list[EncodedDocument]:
    """Token ids of one document, with the tokenizer's tokens for beginning and end, each once.

    In a prompt with a completion, the completion and the end are learned; in a conversation, the assistant's answers
    and the tokens that end its turns. A conversation may become several documents, see `encode_chat`.

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
    """`encode_document` for many documents, in order; texts are tokenized together, which is faster."""
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
    # Prompt and completion are encoded apart, as in generation. A tokenizer that marks the beginning of a text would
    # mark a second one in the completion; if the prompt's tokens are the same within the whole text, the whole text is
    # right for both.
    if both[: len(prompt)] == prompt:
        completion = both[len(prompt) :]
    given = [*_start(prompt or completion, tokenizer), *prompt]
    learned = [*completion, *_end(completion, tokenizer)]
    marks = [False] * len(given) + [True] * len(learned)
    return EncodedDocument(ids=given + learned, learned=marks, origin=document.origin)


def _start(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The token before a text, unless the text spells it out."""
    bos = tokenizer.bos_token_id
    return [] if bos is None or ids[:1] == [bos] else [bos]


def _end(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The token after a text, unless the text spells it out."""
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
    """Cut a very long text before a line that isn't indented, where a word ends for every tokenizer."""
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
