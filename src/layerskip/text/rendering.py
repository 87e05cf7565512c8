"""Chat templates rendered as transformers renders them, and without it where a conversation is nothing but data.

A template comes from wherever the checkpoint comes from: it runs in a sandbox (`sandbox.py`), and sees JSON's types.
"""

from collections.abc import Mapping, Sequence
from typing import Any

REASONING = ("reasoning_content", "thinking", "reasoning")
"""What a message's reasoning may be called; templates read the first name, or the second."""


def render_template(
    template: str,
    conversation: Sequence[Any],
    *,
    variables: Mapping[str, Any],
    tools: Sequence[Any] | None = None,
    documents: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
) -> str:
    """A conversation as a template writes it.

    Functions as tools, messages with objects in them and messages to be continued are left to transformers.

    Args:
        template: In Jinja's language.
        conversation: The messages.
        variables: What else the template may use, such as `bos_token`.
        tools: Functions that the model may call, as JSON schemas.
        documents: What the model may quote from.
        add_generation_prompt: End where an answer begins.
        continue_final_message: Leave the last message open.

    Raises:
        ValueError: There is no message.
        jinja2.TemplateError: The template is broken, or refuses the conversation.
    """
    if not conversation:
        raise ValueError("an empty conversation has nothing to render; give at least one message")
    given = {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt, **variables}
    records = [*conversation, *(tools or ()), *(documents or ())]
    plain = all(isinstance(record, dict) for record in records) and all(map(is_plain, [*records, *variables.values()]))
    if continue_final_message or not plain:
        return _render_by_transformers(template, conversation, continue_final_message=continue_final_message, **given)
    from layerskip.text.sandbox import compile_template

    return compile_template(template).render(messages=[_message(message) for message in conversation], **given)


def _render_by_transformers(template: str, conversation: Sequence[Any], **options: Any) -> str:
    from transformers import PreTrainedTokenizerBase

    renderer = PreTrainedTokenizerBase()  # type: ignore[no-untyped-call]
    return str(renderer.apply_chat_template(list(conversation), chat_template=template, tokenize=False, **options))


def is_plain(value: Any) -> bool:
    """Whether a value consists of JSON's types, which have no methods that a template must not call."""
    if type(value) is dict:
        return all(is_plain(key) and is_plain(item) for key, item in value.items())
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    return value is None or type(value) in (str, int, float, bool)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without what it leaves open (null), and with its reasoning under the names that templates read."""
    known = {key: value for key, value in message.items() if value is not None}
    reasoning = next((known[name] for name in REASONING if name in known), None)
    return known if reasoning is None else {"thinking": reasoning, **known, "reasoning_content": reasoning}
