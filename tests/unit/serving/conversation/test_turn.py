"""Turns of models whose tokenizer suits no grammars."""

import pytest
from chat_templates import HERMES
from tiny import write_tiny
from tiny_tokenizers import unigram

from layerskip import LanguageModel, load
from layerskip.serving.config import RequestLimits
from layerskip.serving.conversation.deltas import together
from layerskip.serving.conversation.tools import Function, ToolUse
from layerskip.serving.conversation.turn import AnswerFormat, Conversations
from layerskip.serving.protocol.errors import ApiError

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = tmp_path_factory.mktemp("unigram")
    tokenizer = unigram()
    tokenizer.chat_template = HERMES
    write_tiny(folder, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    return load(str(folder))


def use(*, required: bool) -> ToolUse:
    function = Function(name="get", param="tools[0].function.parameters")
    return ToolUse(functions=(function,), allowed=(function,), is_required=required, is_parallel=True)


def test_calls_are_read_without_a_grammar(lm: LanguageModel) -> None:
    turn = Conversations(lm, RequestLimits()).turn(MESSAGES, tools=use(required=False))
    assert turn.grammar is None
    whole, broken = '<tool_call>{"name": "get", "arguments": {}}</tool_call>', '<tool_call>{"name": "get", "argu'
    for text, content, number in [(whole, "", 1), (broken, broken, 0)]:
        parser = turn.parser()
        found, calls = together([*parser.push(text), *parser.finish()])
        assert (found, len(calls)) == (content, number)


def test_what_needs_a_grammar_is_refused(lm: LanguageModel) -> None:
    conversations = Conversations(lm, RequestLimits())
    form = AnswerFormat(schema={"type": "object"}, param="response_format")
    for options, param in [
        ({"tools": use(required=True)}, "tool_choice"),
        ({"tools": use(required=False), "answer": form}, "response_format"),
        ({"answer": form}, "response_format"),
    ]:
        with pytest.raises(ApiError, match="bytes") as caught:
            conversations.turn(MESSAGES, **options)  # type: ignore[arg-type]
        assert (caught.value.status, caught.value.param) == (400, param)
