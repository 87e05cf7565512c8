"""`layerskip chat` where no terminal is, with a small template."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import layerskip

TEMPLATE = """{{ bos_token }}{% for m in messages %}# {{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}# assistant: {% endif %}"""


@pytest.fixture
def chat(cli: Callable, tmp_path: Path) -> Callable:
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE)

    def call(stdin: str, *flags: str) -> Any:
        return cli(
            *(
                "chat",
                "--model",
                "demo",
                "--chat-template",
                str(file),
                "--max-new-tokens",
                "10",
                "--ignore-eos",
                *flags,
            ),
            stdin=stdin.encode(),
        )

    return call


def turns(outcome: Any) -> list[dict[str, Any]]:
    assert outcome.code == 0, outcome.err
    return [json.loads(line) for line in outcome.out.splitlines()]


def test_one_json_object_a_turn(chat: Callable) -> None:
    records = turns(chat("hello\n\nthere\n", "--json", "--seed", "1"))
    assert [(record["turn"], record["message"]) for record in records] == [(1, "hello"), (2, "there")]
    assert all(record["stats"]["tokens"] == 10 for record in records)
    assert {"text", "token_ids", "finish_reason", "stop_reason", "seed", "stats", "config"} <= set(records[0])


def test_turns_keep_their_cache(chat: Callable) -> None:
    stats = [record["stats"] for record in turns(chat("one\ntwo\nthree\n", "--json"))]
    assert stats[0]["cached_tokens"] == 0
    for before, after in pairwise(stats):
        assert after["cached_tokens"] >= before["prompt_tokens"]
        assert after["cached_tokens"] < after["prompt_tokens"]


def test_a_cached_conversation_writes_what_a_fresh_one_would(chat: Callable) -> None:
    first, second = turns(chat("one\ntwo\n", "--json"))
    lm = layerskip.load("demo")
    text = f"<s># user: one\n# assistant: {first['text']}\n# user: two\n# assistant: "
    fresh = lm.generate(lm.encode([text], special_tokens=False), max_new_tokens=10, ignore_eos=True)[0]
    assert fresh.stats.prompt_tokens == second["stats"]["prompt_tokens"]
    assert fresh.token_ids == second["token_ids"]


def test_plain_text(chat: Callable) -> None:
    texts = [record["text"] for record in turns(chat("one\ntwo\n", "--json"))]
    outcome = chat("one\ntwo\n")
    assert (outcome.code, outcome.out, outcome.err) == (0, "".join(text + "\n" for text in texts), "")


def test_system_message_comes_first(chat: Callable) -> None:
    without, with_system = (
        turns(chat("one\n", "--json", *flags))[0]["stats"]["prompt_tokens"] for flags in ((), ("--system", "Be kind."))
    )
    assert with_system > without


@pytest.mark.parametrize("line", ["/etc/passwd", "/reset", "/quit", "/help", "//slash", "/", "  /stats"])
def test_without_a_terminal_every_line_is_a_message(chat: Callable, line: str) -> None:
    records = turns(chat(f"one\n{line}\nthree\n", "--json"))
    assert [record["turn"] for record in records] == [1, 2, 3]
    assert records[1]["message"] == line


def test_a_full_context_is_an_error_without_a_user(chat: Callable) -> None:
    outcome = chat("one\ntwo\nthree\nfour\nfive\n", "--max-context", "48")
    assert outcome.code == 2
    assert "the context is full" in outcome.err
    assert "start a new one" in outcome.err.splitlines()[-1]


def test_templates_that_fail(cli: Callable, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    for template, message in (
        ("{% if %}", "the chat template is broken: line 1"),
        ("{{ raise_exception('no such role') }}", "the chat template can't be applied to the conversation: no such"),
    ):
        file.write_text(template)
        outcome = cli("chat", "--model", "demo", "--chat-template", str(file), stdin=b"hello\n")
        assert outcome.code == 2
        assert message in outcome.err
        assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages if m.role == 'user' %}# {{ m.content }}\n{% endfor %}", "leaves the system message out"),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}", "no system"),
    ],
)
def test_a_template_without_a_system_message(cli: Callable, tmp_path: Path, template: str, message: str) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(template)
    outcome = cli("chat", "--model", "demo", "--chat-template", str(file), "--system", "Be kind.", stdin=b"hello\n")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert message in outcome.err
    assert "--system" in outcome.err


def test_a_template_may_spell_the_system_message_otherwise(cli: Callable, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{% for m in messages %}{{ m | tojson }}\n{% endfor %}")
    flags = ("--chat-template", str(file), "--max-new-tokens", "2")
    assert cli("chat", "--model", "demo", *flags, "--system", 'Say "yes".', stdin=b"hello\n").code == 0


def test_no_template_says_what_to_do(cli: Callable) -> None:
    outcome = cli("chat", "--model", "demo", stdin=b"hello\n")
    assert outcome.code == 2
    assert "--chat-template FILE" in outcome.err


def test_messages_that_are_no_text(cli: Callable, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE)
    outcome = cli("chat", "--model", "demo", "--chat-template", str(file), stdin=b"\xff\n")
    assert outcome.code == 2
    assert "not UTF-8" in outcome.err
