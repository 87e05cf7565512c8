"""Chat templates that write tools and calls in the ways of known families, cut down to that."""

from collections.abc import Sequence

from tiny_tokenizers import byte_level
from transformers import PreTrainedTokenizerFast

from layerskip.text.tokenizer import TextTokenizer

PLAIN = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""ChatML without tools."""

HERMES = """\
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools><|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% elif not (loop.first and message.role == 'system') %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}{% if not loop.first or message.content %}
{% endif %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""Qwen's way."""

MISTRAL = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'user' %}
{%- if tools and message == (messages | selectattr('role', 'equalto', 'user') | list | last) %}[AVAILABLE_TOOLS]
{{- tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST] {{ message.content }}[/INST]
{%- elif message.tool_calls is defined %}[TOOL_CALLS] [
{%- for call in message.tool_calls %}
{%- if call.id is not string or call.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}
{%- if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}
{%- elif message.role == 'tool' %}
{%- if message.tool_call_id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}
[TOOL_RESULTS]{{ message.content }}[/TOOL_RESULTS]
{%- elif message.role == 'assistant' %} {{ message.content }}{{ eos_token }}
{%- else %}{{ raise_exception('no system messages') }}{% endif %}{% endfor %}"""
"""Mistral's way; the marks are special tokens, and there are no system messages."""

LLAMA = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.tool_calls is defined %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
<|im_start|>assistant

{"name": "{{ message.tool_calls[0].function.name }}", "parameters": \
{{ message.tool_calls[0].function.arguments | tojson }}}<|im_end|>
{%- else %}<|im_start|>{{ 'ipython' if message.role == 'tool' else message.role }}

{% if tools and message.role == 'user' and loop.first %}{{ tools | tojson }}

{% endif %}{{ message.content }}<|im_end|>
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant

{% endif %}"""
"""Llama 3's way."""

TAGS = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if tools and loop.first %}{{ tools | tojson }}
{% endif %}{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call><function={{ call.function.name }}>
{%- for name, value in call.function.arguments.items() %}<parameter={{ name }}>{{ value }}</parameter>{% endfor -%}
</function></tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""A way that isn't known here."""


def tokenizer_with(template: str, special: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A small byte-level tokenizer with a chat template and further special tokens."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *special]})
    tokenizer.chat_template = template
    return tokenizer


def text_tokenizer_with(template: str, special: Sequence[str] = ()) -> TextTokenizer:
    """The same as this package has it."""
    from tiny_tokenizers import without_transformers

    return without_transformers(tokenizer_with(template, special))
