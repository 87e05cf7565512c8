"""What is learned of a conversation, in templates of the shapes that published models have.

The templates in `templates/` are written after those of Qwen3, SmolLM2, Llama 3.2, Gemma 3, Mistral 7B v0.3, Phi-3,
Phi-4-mini and DeepSeek-R1.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from layerskip.errors import TokenizerError
from layerskip.text.chat_template import render
from layerskip.training.data.encode import encode_document
from layerskip.training.data.reading.documents import ChatDocument, InstructionDocument

TEMPLATES = Path(__file__).parent / "templates"
# Tokens of each model, the first one ends a turn. Qwen3's of reasoning and calls aren't special.
TOKENS = {
    "qwen3": ["<|im_end|>", "<|im_start|>"],
    "smollm2": ["<|im_end|>", "<|im_start|>"],
    "llama3": ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
    "gemma3": ["<end_of_turn>", "<start_of_turn>"],
    "mistral": ["</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"],
    "phi3": ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
    "phi4_mini": ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
}
SYSTEM = {"role": "system", "content": "be old"}
TURNS = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "old boats"},
    {"role": "user", "content": "man"},
    {"role": "assistant", "content": "two\nnine"},
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "old boats again"},
]
TOOL = {
    "type": "function",
    "function": {"name": "count_boats", "description": "Counts.", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"type": "function", "function": {"name": "count_boats", "arguments": {"of": "man"}}}
WITH_TOOLS = [
    {"role": "user", "content": "how many?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "9"},
    {"role": "assistant", "content": "nine"},
]


@pytest.fixture
def with_template(tokenizer: Any) -> Callable[[str], Any]:
    """The tokenizer with a template and its tokens."""

    def make(name: str) -> Any:
        tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text().removesuffix("\n")
        tokenizer.add_special_tokens({"extra_special_tokens": TOKENS.get(name, [])})
        if name == "qwen3":
            tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
        return tokenizer

    return make


def document(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> ChatDocument:
    return ChatDocument(origin="a.jsonl, line 1", messages=tuple(messages), tools=tuple(tools or ()))


def parts(tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None) -> list[list[tuple[str, str]]]:
    """Each example as pairs of what is given and what is learned after it."""
    found = []
    for encoded in encode_document(document(messages, tools), tokenizer):
        assert encoded.learned is not None
        pairs: list[tuple[list[int], list[int]]] = [([], [])]
        for token, learned in zip(encoded.ids, encoded.learned, strict=True):
            if not learned and pairs[-1][1]:
                pairs.append(([], []))
            pairs[-1][learned].append(token)
        found.append([(tokenizer.decode(given), tokenizer.decode(said)) for given, said in pairs if said])
    return found


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("system", [False, True])
def test_what_is_learned_is_what_generation_has_to_write(
    with_template: Callable[[str], Any], name: str, system: bool
) -> None:
    """Each answer is learned once, after exactly the tokens of the prompt for it, up to the token that ends it."""
    tokenizer = with_template(name)
    messages = [SYSTEM, *TURNS] if system else TURNS
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    written: list[tuple[list[int], list[int]]] = []
    for encoded in encode_document(document(messages), tokenizer):
        assert encoded.learned is not None
        starts = [i for i, now in enumerate(encoded.learned) if now and not encoded.learned[i - 1]]
        for start in starts:
            end = start + [*encoded.learned[start:], False].index(False)
            written.append((encoded.ids[:start], encoded.ids[start:end]))
    assert len(written) == len(answers)
    for index, (given, said) in zip(answers, written, strict=True):
        prompt = render(tokenizer, messages[:index], add_generation_prompt=True)
        assert given == tokenizer(prompt, add_special_tokens=False).input_ids
        assert said[-1] == tokenizer.convert_tokens_to_ids(TOKENS[name][0])
        lead = "<think>\n\n</think>\n\n" if name == "qwen3" else " " if name == "mistral" else ""
        assert tokenizer.decode(said) == lead + messages[index]["content"] + TOKENS[name][0]


@pytest.mark.parametrize(
    ("name", "system", "count"),
    [
        *((name, system, 1) for name in ("smollm2", "llama3", "gemma3", "phi3", "phi4_mini") for system in (0, 1)),
        *(("qwen3", 0, 3), ("qwen3", 1, 3), ("mistral", 0, 1), ("mistral", 1, 3)),
    ],
)
def test_examples_of_a_conversation(with_template: Callable[[str], Any], name: str, system: int, count: int) -> None:
    """One, unless the template writes earlier turns in another way once the conversation goes on."""
    assert len(encode_document(document([SYSTEM, *TURNS] if system else TURNS), with_template(name))) == count


def test_qwen3_thinks_about_the_last_question_only(with_template: Callable[[str], Any]) -> None:
    first = {"role": "assistant", "content": "old boats", "reasoning_content": "nine"}
    second = {"role": "assistant", "content": "<think>\ntwo\n</think>\n\nman"}
    found = parts(with_template("qwen3"), [TURNS[0], first, TURNS[2], second])
    assert found == [
        [
            (
                "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n",
                "<think>\nnine\n</think>\n\nold boats<|im_end|>",
            )
        ],
        [
            (
                "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\nold boats<|im_end|>\n"
                "<|im_start|>user\nman<|im_end|>\n<|im_start|>assistant\n",
                "<think>\ntwo\n</think>\n\nman<|im_end|>",
            )
        ],
    ]


@pytest.mark.parametrize("name", ["qwen3", "llama3", "mistral"])
def test_tools_are_in_the_prompt_and_calls_are_learned(with_template: Callable[[str], Any], name: str) -> None:
    tokenizer = with_template(name)
    found = parts(tokenizer, WITH_TOOLS, [TOOL])
    (given, said) = found[0][0]
    assert '"name": "count_boats"' in given
    assert '"description": "Counts."' in given
    assert '{"of": "man"}' in said
    assert said.endswith(TOKENS[name][0])
    assert "Counts." not in said
    assert found[-1][-1][1].endswith(f"nine{TOKENS[name][0]}")
    assert "9" in found[-1][-1][0]
    without = parts(tokenizer, WITH_TOOLS)
    assert "Counts." not in without[0][0][0]


def test_a_template_of_its_own_for_tools(with_template: Callable[[str], Any]) -> None:
    tokenizer = with_template("smollm2")
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": (TEMPLATES / "qwen3.jinja").read_text()}
    assert "Counts." in parts(tokenizer, WITH_TOOLS, [TOOL])[0][0][0]


def test_a_prompt_that_no_answer_goes_on_from(with_template: Callable[[str], Any]) -> None:
    """DeepSeek-R1's ends with an open thought, and its template writes no thoughts."""
    with pytest.raises(TokenizerError, match=r"line 1, message 2: the prompt .*<think>.* isn't what comes before"):
        parts(with_template("deepseek_r1"), TURNS)


def test_marks_that_leave_out_the_end_of_a_turn(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"extra_special_tokens": TOKENS["smollm2"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (example,) = parts(tokenizer, TURNS)
    assert [said for _, said in example] == ["old boats<|im_end|>", "two\nnine<|im_end|>", "old boats again<|im_end|>"]


def test_a_token_that_would_reach_from_the_prompt_into_the_answer(with_template: Callable[[str], Any]) -> None:
    """The model sees the prompt's tokens alone when it is asked."""
    tokenizer = with_template("smollm2")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}".replace(
        "{{ m.content }}", "{% if m.role == 'assistant' %}the ol{% endif %}{{ m.content }}"
    ) + ("{% if add_generation_prompt %}the ol{% endif %}")
    prompt = tokenizer("man</s>the ol", add_special_tokens=False).input_ids
    assert tokenizer("man</s>the old", add_special_tokens=False).input_ids[: len(prompt)] != prompt
    messages = [{"role": "user", "content": "man"}, {"role": "assistant", "content": "d"}]
    (encoded,) = encode_document(document(messages), tokenizer)
    assert encoded.ids[: len(prompt)] == prompt
    assert parts(tokenizer, messages) == [[("man</s>the ol", "d</s>")]]


def test_instructions_are_a_question_or_alpacas_own_prompt(with_template: Callable[[str], Any], tokenizer: Any) -> None:
    task = InstructionDocument(origin="a", instruction="the cat", input="old", output="boats")
    (encoded,) = encode_document(task, tokenizer)
    text = tokenizer.decode(encoded.ids)
    assert text.startswith("<s>Below is an instruction that describes a task, paired with an input that provides furth")
    assert text.endswith("### Instruction:\nthe cat\n\n### Input:\nold\n\n### Response:\nboats</s>")
    (encoded,) = encode_document(task, with_template("phi3"))
    assert tokenizer.decode(encoded.ids) == "<|user|>\nthe cat\n\nold<|end|>\n<|assistant|>\nboats<|end|>\n</s>"


def test_templates_are_read_as_transformers_reads_them(with_template: Callable[[str], Any], tmp_path: Path) -> None:
    """A folder that is saved and loaded teaches the same."""
    tokenizer = with_template("qwen3")
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert encode_document(document(TURNS), again) == encode_document(document(TURNS), tokenizer)
