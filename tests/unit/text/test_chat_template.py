"""Conversations as text, and the tokens that end answers, with templates as the known families have them."""

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from layerskip.errors import PromptError, TokenizerError
from layerskip.text.chat_template import AnswerFrame, answer_frame, end_of_turn_tokens, render, require_template

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (  # an empty think block in the last turn only
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
VICUNA = (  # the answer at the end is left open
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} ASSISTANT:{% else %} {{ m.content }}"
    "{% if not loop.last %}</s>{% endif %}{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}### assistant:"

FAMILIES: list[tuple[str, str, str, str | None]] = [
    ("chatml", CHATML, "<|im_end|>\n<|im_start|>assistant", "<|im_end|>"),
    ("qwen3", QWEN3, "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>", "<|im_end|>"),
    ("llama 3", LLAMA_3, "<|eot_id|><|start_header_id|>assistant<|end_header_id|>", "<|eot_id|>"),
    ("llama 2", LLAMA_2, "[/INST]", "</s>"),
    ("gemma", GEMMA, "<end_of_turn>\n<start_of_turn>model", "<end_of_turn>"),
    ("phi 3", PHI_3, "<|end|>\n<|assistant|>", "<|end|>"),
    ("vicuna", VICUNA, "ASSISTANT:", "</s>"),
    ("plain", PLAIN, "### assistant:", None),
]
ADDED = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>"),
]
USER = {"role": "user", "content": "Hello there!"}
ANSWER = {"role": "assistant", "content": "Hello."}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, with the special tokens of all these families."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Some folders forget to call the end of a turn special; it is a token all the same.
    tokenizer.add_tokens([AddedToken(text, special=text != "<end_of_turn>", normalized=False) for text in ADDED])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(("family", "template", "opening", "end"), FAMILIES, ids=[family[0] for family in FAMILIES])
class TestAnswerFrames:
    def test_what_stands_around_an_answer(
        self, tokenizer: PreTrainedTokenizerFast, family: str, template: str, opening: str, end: str | None
    ) -> None:
        ends = () if end is None else (tokenizer.convert_tokens_to_ids(end),)
        assert answer_frame(tokenizer, template) == AnswerFrame(openings=(opening,), end_tokens=ends)
        assert end_of_turn_tokens(tokenizer) == ()  # no template of its own
        tokenizer.chat_template = template
        assert end_of_turn_tokens(tokenizer) == ends

    def test_prompts_of_conversations_are_told_from_others(
        self, tokenizer: PreTrainedTokenizerFast, family: str, template: str, opening: str, end: str | None
    ) -> None:
        frame = answer_frame(tokenizer, template)
        for messages in ([USER], [USER, ANSWER, USER]):
            text = render(tokenizer, messages, template=template)
            prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert frame.ends_of(tokenizer, prompt) == frame.end_tokens
        for text in ("Hello there!", "<s>def add(a, b):", "the assistant", ""):
            assert frame.ends_of(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"]) == ()


def test_an_answer_that_stands_may_begin_otherwise_than_one_to_come(tokenizer: PreTrainedTokenizerFast) -> None:
    template = QWEN3.replace("assistant\n<think>\n\n</think>\n\n{% endif %}", "assistant\n{% endif %}")
    assert template != QWEN3
    start = "<|im_end|>\n<|im_start|>assistant"
    assert answer_frame(tokenizer, template).openings == (start, f"{start}\n<think>\n\n</think>")


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% for m in messages %}{{ raise_exception('never') }}{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}",
        "{% if %}",
        "nothing of the messages</s>",
    ],
)
def test_where_no_end_can_be_told(tokenizer: PreTrainedTokenizerFast, template: str | None) -> None:
    tokenizer.chat_template = template
    assert end_of_turn_tokens(tokenizer) == ()


def test_an_end_made_of_ordinary_tokens_is_no_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert end_of_turn_tokens(tokenizer, CHATML.replace("<|im_end|>", "<|no_token|>")) == ()


def test_the_longest_token_is_meant(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>\n", "<|im"]})
    assert end_of_turn_tokens(tokenizer, CHATML) == (tokenizer.convert_tokens_to_ids("<|im_end|>\n"),)


class TestRender:
    def test_it_is_what_transformers_renders(self, tokenizer: PreTrainedTokenizerFast) -> None:
        tokenizer.chat_template = LLAMA_3
        messages = [USER, ANSWER, USER]
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert render(tokenizer, iter(messages)) == expected
        assert render(tokenizer, messages, add_generation_prompt=False) == expected.rpartition("<|start_header_id|>")[0]
        left_open = render(tokenizer, [USER, ANSWER], add_generation_prompt=False, continue_final_message=True)
        assert left_open.endswith("Hello.")

    def test_tools_and_variables_reach_the_template(self, tokenizer: PreTrainedTokenizerFast) -> None:
        template = "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{{ mood }}"
        tool = {"type": "function", "function": {"name": "clock", "description": "the time", "parameters": {}}}
        assert render(tokenizer, [USER], template=template, tools=[tool], mood="!") == "[clock]!"
        assert render(tokenizer, [USER], template=template) == ""

    def test_a_template_for_tools_is_not_the_default(self, tokenizer: PreTrainedTokenizerFast) -> None:
        tokenizer.chat_template = {"default": "plain", "tool_use": "tools"}
        assert render(tokenizer, [USER]) == "plain"
        assert render(tokenizer, [USER], tools=[{"type": "function"}]) == "tools"
        tokenizer.chat_template = {"one": "a", "two": "b"}
        with pytest.raises(TokenizerError, match="none called 'default'"):
            render(tokenizer, [USER])

    @pytest.mark.parametrize(
        ("template", "messages", "message"),
        [
            (GEMMA, [{"role": "system", "content": "Be brief."}, USER], "System role not supported"),
            ("{{ messages[5].content.nothing }}", [USER], "undefined|no element"),
            ("{{ 1 / 0 }}", [USER], "division by zero"),
            ("{% for i in range(10**9) %}{% endfor %}", [USER], "Range too big"),
            ("{{ ().__class__.__subclasses__() }}", [USER], "unsafe"),
            ("{{ raise_exception('two\\nlines') }}", [USER], "two lines"),
            (CHATML, [], "empty conversation"),
            (CHATML, ["Hello"], "sequence"),
        ],
    )
    def test_conversations_that_a_template_does_not_take(
        self, tokenizer: PreTrainedTokenizerFast, template: str, messages: Any, message: str
    ) -> None:
        with pytest.raises(PromptError, match=message) as error:
            render(tokenizer, messages, template=template, name="prompt 3")
        assert "the chat template can't be applied to prompt 3" in str(error.value)
        assert "\n" not in str(error.value)

    def test_a_broken_template(self, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(TokenizerError, match="the chat template is broken: line 2"):
            render(tokenizer, [USER], template="ok\n{% if %}")

    def test_no_template_says_what_to_do(self, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(TokenizerError, match=r"'my-model' has no chat template.*--chat-template.*generate"):
            require_template(tokenizer, "my-model")
        assert require_template(tokenizer, "my-model", CHATML) == CHATML
