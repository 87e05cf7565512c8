"""Conversations -> token ids through the tokenizer's chat template, and which of them the assistant says."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from layerskip.errors import InvalidArgumentError, TokenizerError
from layerskip.training.data.documents import ChatDocument

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
MARK_TURNS = (
    "mark what the assistant says in the template with {% generation %} ... {% endgeneration %}, or train on plain text"
)


def encode_chat(document: ChatDocument, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and for each whether the assistant says it.

    Templates with `{% generation %}` mark what the assistant says. With others, each of its turns is what the template
    adds to the conversation before it and the prompt for an answer, up to the token that ends the turn.

    Raises:
        TokenizerError: No chat template, a tokenizer that can't locate tokens in the text, or a template from which
            the turns can't be told.
        InvalidArgumentError: The template refuses the conversation.
    """
    template = _template(tokenizer)
    if not tokenizer.is_fast:
        raise TokenizerError(
            f"{type(tokenizer).__name__} can't tell where its tokens are in a text, which learning from conversations "
            "needs; use a fast tokenizer (tokenizer.json)"
        )
    if GENERATION_TAG.search(template):
        encoded = _render(tokenizer, document.messages, document.origin, return_assistant_tokens_mask=True)
        return list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]
    text = str(_render(tokenizer, document.messages, document.origin, tokenize=False))
    spans = _assistant_spans(text, document, tokenizer)
    encoded = tokenizer(
        text, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
    )
    # A token that is partly outside is given by the prompt. Some tokenizers leave spaces out of offsets: a lone space
    # before a turn then has an empty one that starts where the turn does, and isn't of it.
    learned = [
        any(first <= start and first < end <= last for first, last in spans) for start, end in encoded["offset_mapping"]
    ]
    return list(encoded["input_ids"]), learned


def _template(tokenizer: "PreTrainedTokenizerBase") -> str:
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as error:
        raise TokenizerError(
            "the data has conversations, and the tokenizer has no chat template; use a model made for chat, or set "
            "tokenizer.chat_template (file chat_template.jinja beside tokenizer.json)"
        ) from error
    return template


def _assistant_spans(text: str, document: ChatDocument, tokenizer: "PreTrainedTokenizerBase") -> list[tuple[int, int]]:
    """Where the assistant's turns are in the rendered conversation: from after the prompt to the turn's end token."""
    specials = tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    spans = []
    for index, message in enumerate(document.messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise InvalidArgumentError(
                f"{document.origin} starts with the assistant, and this chat template has no prompt for that; remove "
                f"its first message, or {MARK_TURNS}"
            )
        before = str(
            _render(tokenizer, document.messages[:index], document.origin, tokenize=False, add_generation_prompt=True)
        )
        through = str(_render(tokenizer, document.messages[: index + 1], document.origin, tokenize=False))
        if not through.startswith(before) or not text.startswith(through):
            raise TokenizerError(
                f"{document.origin}, message {index + 1}: the chat template writes a turn differently once the "
                f"conversation goes on, so that the assistant's part can't be told; {MARK_TURNS}"
            )
        end = len(through)
        stripped = through.rstrip()
        if specials and stripped.endswith(specials):  # generation stops there, and never writes the line break after it
            end = len(stripped)
        spans.append((len(before), end))
    return spans


def _render(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, Any]], origin: str, **options: Any
) -> Any:
    from jinja2 import TemplateError

    if options.get("tokenize", True):
        options["return_dict"] = True
    try:
        return tokenizer.apply_chat_template([dict(message) for message in messages], **options)
    except TemplateError as error:
        raise InvalidArgumentError(
            f"the tokenizer's chat template refuses {origin}: {error}; correct or remove this conversation"
        ) from error
