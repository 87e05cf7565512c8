"""Conversations to token ids by the tokenizer's chat template, with the assistant's tokens marked.

A model learns what it will have to generate. The context is the prompt for an answer, with the history as the template
renders it at that moment; the target is the answer as the template renders it, up to the token that ends the turn.

Most templates render a turn in the same way whatever follows it. A conversation is then one example, in which all
answers are learned. Others don't: Qwen3's template leaves out the reasoning of earlier turns, Mistral's moves the
system message to the last question. An answer is then an example of its own, together with everything before it, unless
its prompt continues from an earlier answer.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from layerskip.errors import InvalidArgumentError, PromptError, TokenizerError
from layerskip.text.chat_template import end_of_turn_tokens, render
from layerskip.training.data.reading.documents import ChatDocument

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
MARK_TURNS = (
    "mark what the assistant says in the template with {% generation %} ... {% endgeneration %}, or train on plain text"
)

Example = tuple[list[int], list[bool]]
"""Token ids, and whether each is learned."""
Span = tuple[int, int]
"""First character of a part of a text, and the one after its last."""


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """An answer of the assistant, as the template renders it while it is the last turn."""

    prompt: str
    """The text that generation starts from."""
    answer: str
    size: int
    """Characters of the answer up to and including its end token; what the template adds after that isn't counted."""


def encode_chat(document: ChatDocument, tokenizer: "PreTrainedTokenizerBase") -> list[Example]:
    """Examples of a conversation: one, or several if the template renders earlier turns in another way.

    Raises:
        TokenizerError: No chat template, a tokenizer that can't locate tokens in the text, or a template that doesn't
            show where turns begin and end.
        InvalidArgumentError: The template refuses the conversation.
    """
    template = _template(document, tokenizer)
    if not tokenizer.is_fast:
        raise TokenizerError(
            f"{type(tokenizer).__name__} can't tell where its tokens are in a text, which learning from conversations "
            "needs; use a fast tokenizer (tokenizer.json)"
        )
    if GENERATION_TAG.search(template):
        return [_encode_marked(document, tokenizer)]
    turns = _turns(document, tokenizer, _tail(tokenizer, template, len(tokenizer)))
    return [_encode_spans(text, spans, tokenizer) for text, spans in _joined(turns)]


def _template(document: ChatDocument, tokenizer: "PreTrainedTokenizerBase") -> str:
    try:
        return str(tokenizer.get_chat_template(tools=[dict(tool) for tool in document.tools] or None))
    except ValueError as error:
        raise TokenizerError(
            "the data has conversations, and the tokenizer has no chat template; use a model made for chat, or set "
            "tokenizer.chat_template (file chat_template.jinja beside tokenizer.json)"
        ) from error


def _encode_marked(document: ChatDocument, tokenizer: "PreTrainedTokenizerBase") -> Example:
    """One example; the template itself marks the answers."""
    _render(document, len(document.messages), tokenizer)  # its errors are ours
    encoded: Any = tokenizer.apply_chat_template(
        [dict(message) for message in document.messages],
        tools=[dict(tool) for tool in document.tools] or None,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    ids = list(encoded["input_ids"])
    learned = [bool(mark) for mark in encoded["assistant_masks"]]
    # Many templates mark the answer without the token that ends the turn, which generation has to generate too.
    ends = {*end_of_turn_tokens(tokenizer), tokenizer.eos_token_id}
    for index in range(1, len(ids)):
        if learned[index - 1] and ids[index] in ends and ids[index - 1] not in ends:
            learned[index] = True
    return ids, learned


def _turns(document: ChatDocument, tokenizer: "PreTrainedTokenizerBase", tail: "re.Pattern[str] | None") -> list[_Turn]:
    turns = []
    for index, message in enumerate(document.messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise InvalidArgumentError(
                f"{document.origin} starts with the assistant, and this chat template has no prompt for that; remove "
                f"its first message, or {MARK_TURNS}"
            )
        prompt = _render(document, index, tokenizer, prompt=True)
        through = _render(document, index + 1, tokenizer)
        if through.startswith(prompt):
            answer = through[len(prompt) :]
        else:
            answer = _answer_after(prompt, through, document, index)
        turns.append(_Turn(prompt=prompt, answer=answer, size=_size(answer, tail)))
    return turns


@lru_cache(maxsize=4)
def _tail(tokenizer: "PreTrainedTokenizerBase", template: str, size: int) -> "re.Pattern[str] | None":
    """A pattern for what a template puts after an answer: the end token, then white space and perhaps another token.

    Args:
        tokenizer: The tokenizer.
        template: Its chat template.
        size: Number of its tokens; a tokenizer that has changed is another key of the cache.
    """
    ends = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    ends |= {str(tokenizer.convert_ids_to_tokens(token)) for token in end_of_turn_tokens(tokenizer, template)}
    tokens = "|".join(re.escape(token) for token in sorted(ends, key=len, reverse=True) if token.strip())
    return re.compile(rf"(?P<end>{tokens})(?:\s|{tokens})*\Z") if tokens else None


def _size(answer: str, tail: "re.Pattern[str] | None") -> int:
    """Characters of an answer up to and including the token that ends it; all characters if there is none."""
    found = tail.search(answer) if tail is not None else None
    return len(answer) if found is None else found.end("end")


def _answer_after(prompt: str, through: str, document: ChatDocument, index: int) -> str:
    """The answer, if the template renders the history differently once the answer is there.

    The answer is found after the last message before it and what the template puts between the two.
    """
    asked, said = (_content(document, place) for place in (index - 1, index))
    at = prompt.rfind(asked) if asked else -1
    if at >= 0:
        end_of_prompt, limit = prompt[at:], len(through)
        while (found := through.rfind(end_of_prompt, 0, limit)) >= 0:
            answer = through[found + len(end_of_prompt) :]
            if said in answer:
                return answer
            limit = found + len(end_of_prompt) - 1
    raise TokenizerError(
        f"{document.origin}, message {index + 1}: the prompt that the chat template writes for an answer "
        f"(...{prompt[-24:]!r}) isn't what comes before the answer in the conversation, so that the assistant's part "
        f"can't be told; {MARK_TURNS}"
    )


def _content(document: ChatDocument, index: int) -> str:
    return str(document.messages[index].get("content") or "").strip()


def _joined(turns: Sequence[_Turn]) -> list[tuple[str, list[Span]]]:
    """Texts with the parts that are learned; an answer whose prompt continues an earlier text joins that text."""
    texts: list[tuple[str, list[Span]]] = []
    for turn in turns:
        start = len(turn.prompt)
        span, text = (start, start + turn.size), turn.prompt + turn.answer
        if texts and turn.prompt.startswith(texts[-1][0][: texts[-1][1][-1][1]]):
            texts[-1] = (text, [*texts[-1][1], span])
        else:
            texts.append((text, [span]))
    return texts


def _encode_spans(text: str, spans: Sequence[Span], tokenizer: "PreTrainedTokenizerBase") -> Example:
    """Token ids of a text; the tokens within the spans are learned."""
    ids, offsets = _encode(text, tokenizer)
    # A token must not reach from a prompt into its answer: generation sees the prompt's tokens alone.
    cuts = [first for first, _ in spans if any(start < first < end for start, end in offsets)]
    if cuts:
        ids, offsets = [], []
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            piece_ids, piece_offsets = _encode(text[start:end], tokenizer)
            ids += piece_ids
            offsets += [(start + first, start + last) for first, last in piece_offsets]
    # Some tokenizers leave spaces out of offsets: a lone space before a turn then has an empty span that starts with
    # the turn but isn't part of it.
    learned = [any(first <= start and first < end <= last for first, last in spans) for start, end in offsets]
    return ids, learned


def _encode(text: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[Span]]:
    encoded = tokenizer(
        text, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
    )
    return list(encoded["input_ids"]), list(encoded["offset_mapping"])


def _render(document: ChatDocument, count: int, tokenizer: "PreTrainedTokenizerBase", *, prompt: bool = False) -> str:
    """Render the conversation's first messages, as the prompt for an answer or as they stand."""
    try:
        return render(
            tokenizer,
            document.messages[:count],
            tools=[dict(tool) for tool in document.tools] or None,
            add_generation_prompt=prompt,
            name=document.origin,
        )
    except PromptError as error:
        raise InvalidArgumentError(str(error)) from error
