"""Chat templates: a conversation as one text, and what the template writes around an answer.

A rendered text holds all its special tokens, a leading <s> too. It becomes ids without adding any:
`LanguageModel.encode_chat`, or `tokenizer.encode(text, add_special_tokens=False)`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerskip.errors import PromptError, TokenizerError
from layerskip.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
"""What one side says: `role`, `content`, and whatever else the template reads."""

QUESTION, ANSWER = "Which word?", "Xylophonic"
"""A conversation that is rendered to see what the template writes around an answer; templates don't hold its words."""
SPARE_TOKENS = 8
"""A prompt's end is compared as text; tokens more than that text alone would have, in case it is split otherwise."""


@dataclass(frozen=True, kw_only=True)
class AnswerFrame:
    """What a template writes around an answer."""

    openings: tuple[str, ...] = ()
    """Text after a question, where the answer is to come and where it stands, without white space at its ends."""
    end_tokens: tuple[int, ...] = ()
    """The token directly after an answer, if it is a single one that stands for the end of a turn."""

    def ends_of(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> tuple[int, ...]:
        """Tokens that end what is written after a prompt: the template's, if the prompt is one of its conversations.

        It is if a turn in it has ended in the template's way, or if it stops where an answer begins.
        """
        if not self.end_tokens or not set(self.end_tokens).isdisjoint(prompt):
            return self.end_tokens
        if not self.openings:
            return ()
        size = max(len(tokenizer.encode(opening, add_special_tokens=False)) for opening in self.openings)
        tail = str(tokenizer.decode(list(prompt[-size - SPARE_TOKENS :]), clean_up_tokenization_spaces=False))
        return self.end_tokens if tail.rstrip().endswith(self.openings) else ()


def require_template(
    tokenizer: Tokenizer,
    name: str,
    template: str | None = None,
    *,
    tools: list[Any] | None = None,
) -> str:
    """The template that applies: the one given, or the tokenizer's own.

    Where the tokenizer has several, that is the one called `default`, or `tool_use` if there are tools.

    Args:
        tokenizer: The checkpoint's tokenizer.
        name: What an error calls the checkpoint.
        template: A Jinja template in place of the tokenizer's.
        tools: Functions that the model may call.

    Raises:
        TokenizerError: There is none.
    """
    try:
        return str(tokenizer.get_chat_template(template, tools))
    except ValueError as error:
        several = isinstance(tokenizer.chat_template, dict)
        found = f"several chat templates and none called 'default' ({error})" if several else "no chat template"
        raise TokenizerError(
            f"the tokenizer of {name!r} has {found}; take a model for conversations, give a template (Jinja; "
            "chat_template.jinja beside tokenizer.json, or --chat-template FILE of layerskip chat), or let the model "
            "continue a text with layerskip generate"
        ) from error


def render(
    tokenizer: Tokenizer,
    messages: Iterable[Message],
    *,
    template: str | None = None,
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    name: str = "the conversation",
    **variables: Any,
) -> str:
    """A conversation as the chat template writes it, special tokens included.

    Args:
        tokenizer: Its template is used, and its special tokens.
        messages: What was said, in order.
        template: A Jinja template in place of the tokenizer's.
        tools: Functions that the model may call, as JSON schemas.
        add_generation_prompt: End where an answer begins.
        continue_final_message: Leave the last message open, to be continued.
        name: What an error calls the conversation.
        **variables: Other variables of the template, such as `enable_thinking`.

    Raises:
        TokenizerError: There is no template, or it is broken.
        PromptError: The template doesn't take this conversation.
    """
    from jinja2 import TemplateSyntaxError

    functions = None if tools is None else list(tools)
    template = require_template(tokenizer, str(tokenizer.name_or_path), template, tools=functions)
    try:
        rendered = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=template,
            tools=functions,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=False,
            **variables,
        )
    except TemplateSyntaxError as error:
        raise TokenizerError(
            f"the chat template is broken: line {error.lineno}: {_one_line(error)}; correct it"
        ) from error
    except Exception as error:  # templates are programs: what they raise on purpose, and nearly any other
        raise PromptError(
            f"the chat template can't be applied to {name}: {_one_line(error)}; change the messages (roles that the "
            "template knows, in an order that it allows), or take another template"
        ) from error
    return str(rendered)


def answer_frame(tokenizer: Tokenizer, template: str | None = None) -> AnswerFrame:
    """What the template writes around an answer; nothing where there is no template, or it takes no plain question.

    The last answer of a conversation decides. Where the template leaves that one open, an answer that the user
    has replied to does.

    Args:
        tokenizer: The checkpoint's tokenizer.
        template: A Jinja template in place of the tokenizer's.
    """
    question, answer = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
    asked = _rendered(tokenizer, [question], template, add_generation_prompt=True)
    openings, end = [_after(asked, QUESTION).strip()], None
    for messages in ([question, answer], [question, answer, question]):
        text = _rendered(tokenizer, messages, template, add_generation_prompt=False)
        before, found, after = text.partition(ANSWER)
        if found:
            openings.append(_after(before, QUESTION).strip())
            end = _leading_token(tokenizer, after.lstrip())
        if end is not None:
            break
    return AnswerFrame(openings=tuple(dict.fromkeys(filter(None, openings))), end_tokens=() if end is None else (end,))


def end_of_turn_tokens(tokenizer: Tokenizer, template: str | None = None) -> tuple[int, ...]:
    """Ids of the token that the chat template puts directly after an answer, where that is a single added token.

    Such as `<|im_end|>`, `<|eot_id|>`, `<end_of_turn>` or `</s>`. Nothing where there is no template, or where
    turns end with ordinary text.

    Args:
        tokenizer: The checkpoint's tokenizer.
        template: A Jinja template in place of the tokenizer's.
    """
    return answer_frame(tokenizer, template).end_tokens


def _rendered(tokenizer: Tokenizer, messages: Sequence[Message], template: str | None, **options: Any) -> str:
    """A conversation as the template writes it; nothing where it can't."""
    try:
        return render(tokenizer, messages, template=template, **options)
    except (TokenizerError, PromptError):
        return ""


def _after(text: str, part: str) -> str:
    """What follows a part of a text where it stands last; nothing where it doesn't."""
    return text.rpartition(part)[2] if part in text else ""


def _leading_token(tokenizer: Tokenizer, text: str) -> int | None:
    """The added token that a text begins with; they are found in a text before anything else is."""
    added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
    found = [token for token in added if token.strip() and text.startswith(token.strip())]
    return added[max(found, key=len)] if found else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
