"""Where texts end, in every command and in Python: end tokens, ends of turns, special tokens as stop strings."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from parrot import write_parrot
from tiny_tokenizers import byte_fallback, byte_level
from transformers import AutoModelForCausalLM

import layerskip
from layerskip.decoding.config import GenerationConfig
from layerskip.evaluation.data.datasets import Example, encode_examples
from layerskip.language_model import LanguageModel

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FOLLOWS = {"a": "b", "b": "<|im_end|>", "<|im_end|>": "c", "c": "d", "d": "c"}
"""After anything else comes an answer, "ab", its end, and then "cdcd..." for ever; never </s>."""
MESSAGES = [{"role": "user", "content": "Hello!"}]
LENGTH = 12
ENDED, ENDLESS = "ab", "ab" + "cd" * 4 + "c"
END = "<|im_end|>"


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Callable[..., Path]:
    """A factory of checkpoints that write `FOLLOWS`.

    Args of the factory:
        named: What config.json and generation_config.json call the end of a text; nothing if not given.
        eos_token: What the tokenizer calls it.
        template: The chat template.
    """

    def write(named: str | None = None, eos_token: str = "</s>", template: str | None = CHATML) -> Path:
        tokenizer = byte_level()
        tokenizer.eos_token = eos_token
        tokenizer.chat_template = template
        end = None if named is None else tokenizer.convert_tokens_to_ids(named)
        config = {} if end is None else {"eos_token_id": end}
        return write_parrot(tiny_checkpoint, tokenizer, FOLLOWS, generation_config=config or None, **config)

    return write


@pytest.fixture(scope="module")
def silent(folder: Callable[..., Path]) -> Path:
    """Only the tokenizer says what ends a text."""
    return folder(eos_token=END)


@pytest.fixture(scope="module")
def turned(folder: Callable[..., Path]) -> Path:
    """All name </s>, and the chat template ends turns with another token."""
    return folder(named="</s>")


@pytest.fixture(scope="module")
def disagreeing(folder: Callable[..., Path]) -> Path:
    """The configurations name </s>, the tokenizer another token."""
    return folder(named="</s>", eos_token=END)


class Commands:
    """Text that each command writes with a checkpoint."""

    def __init__(self, cli: Callable[..., Any], tmp_path: Path) -> None:
        self._cli, self._folder, self._count = cli, tmp_path, 0

    def run(self, command: str, model: Path, *flags: str, stdin: bytes = b"") -> str:
        arguments = ("--model", str(model), "--device", "cpu", "--max-new-tokens", str(LENGTH), *flags)
        outcome = self._cli(command, *arguments, stdin=stdin)
        assert outcome.code == 0, outcome.err
        return outcome.out

    def generate(self, model: Path, *flags: str, prompt: str = "x") -> str:
        record = json.loads(self.run("generate", model, "--prompt", prompt, "--json", *flags))
        plain = self.run("generate", model, "--prompt", prompt, *flags)
        assert plain == record["text"] + "\n"
        return str(record["text"])

    def chat(self, model: Path, *flags: str) -> list[str]:
        out = self.run("chat", model, "--json", *flags, stdin=b"Hello!\nAnd again\n")
        return [json.loads(line)["text"] for line in out.splitlines()]

    def batch(self, model: Path, prompts: list[Any], *flags: str) -> list[str]:
        self._count += 1
        source, target = (self._folder / f"{self._count}.{name}.jsonl" for name in ("in", "out"))
        source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        self.run("batch", model, "--input", str(source), "--output-file", str(target), *flags)
        return [json.loads(line)["text"] for line in target.read_text().splitlines()]


@pytest.fixture
def commands(cli: Callable[..., Any], tmp_path: Path) -> Commands:
    return Commands(cli, tmp_path)


def load(folder: Path) -> LanguageModel:
    return layerskip.load(str(folder), dtype="float32", device="cpu")


def texts(lm: LanguageModel, prompts: Any, **options: Any) -> list[str]:
    """What is written in every way, which is always the same."""
    ways: list[dict[str, Any]] = [{}, {"generation_strategy": "autoregressive"}, {"exit_layer": 1}]
    found = [[r.text for r in lm.generate(prompts, max_new_tokens=LENGTH, **way, **options)] for way in ways]
    assert found[0] == found[1] == found[2]
    return found[0]


class TestTheTokenizersOwnEnd:
    def test_every_command_ends_there_where_the_configurations_are_silent(
        self, silent: Path, commands: Commands
    ) -> None:
        assert commands.generate(silent) == ENDED
        assert commands.chat(silent) == [ENDED, ENDED]
        assert commands.batch(silent, ["x", MESSAGES]) == [ENDED, ENDED]

    def test_python(self, silent: Path) -> None:
        lm = load(silent)
        end = lm.tokenizer.convert_tokens_to_ids(END)
        assert lm.checkpoint.eos_token_ids == (end,)
        assert texts(lm, ["x", [89, 90]]) == [ENDED, ENDED]
        (result,) = lm.generate(["x"], max_new_tokens=LENGTH)
        assert (result.finish_reason, result.stop_reason, result.token_ids[-1]) == ("stop", end, end)
        assert texts(lm, ["x"], ignore_eos=True) == [ENDLESS]
        assert texts(lm, ["x"], eos_token_ids=()) == [ENDLESS]

    def test_the_configurations_win_where_they_name_one(self, disagreeing: Path, commands: Commands) -> None:
        """As in transformers, so that a text is the same there."""
        lm = load(disagreeing)
        assert lm.checkpoint.eos_token_ids == (lm.tokenizer.convert_tokens_to_ids("</s>"),)
        assert texts(lm, ["x"]) == [commands.generate(disagreeing)] == commands.batch(disagreeing, ["x"]) == [ENDLESS]
        model = AutoModelForCausalLM.from_pretrained(disagreeing)
        inputs = lm.tokenizer("x", return_tensors="pt")
        theirs = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False, pad_token_id=0)
        assert lm.tokenizer.decode(theirs[0, 1:], skip_special_tokens=True) == ENDLESS

    def test_a_token_that_the_network_cannot_write_is_none(self, tiny_checkpoint: Callable[..., Path]) -> None:
        folder = tiny_checkpoint(vocab_size=20)
        byte_level().save_pretrained(folder)
        tokenizer = byte_level()
        tokenizer.eos_token = "Z"
        tokenizer.save_pretrained(folder)
        assert tokenizer.eos_token_id >= 20
        assert load(folder).checkpoint.eos_token_ids == ()

    def test_no_tokenizer_no_end(self, tiny_checkpoint: Callable[..., Path]) -> None:
        assert load(tiny_checkpoint()).checkpoint.eos_token_ids == ()


class TestEndsOfTurns:
    def test_every_command_ends_there_after_a_conversation(self, turned: Path, commands: Commands) -> None:
        assert commands.chat(turned) == [ENDED, ENDED]
        assert commands.batch(turned, [MESSAGES, "x", MESSAGES]) == [ENDED, ENDLESS, ENDED]
        assert commands.generate(turned) == ENDLESS
        assert commands.generate(turned, prompt="<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n") == ENDED

    def test_chat_with_a_template_from_a_file(
        self, folder: Callable[..., Path], commands: Commands, tmp_path: Path
    ) -> None:
        model = folder(named="</s>", template=None)
        file = tmp_path / "template.jinja"
        file.write_text(
            "{% for m in messages %}# {{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}<|im_end|>"
            "{% endif %}\n{% endfor %}{% if add_generation_prompt %}# assistant:\n{% endif %}"
        )
        assert commands.chat(model, "--chat-template", str(file)) == [ENDED, ENDED]
        assert commands.chat(model, "--chat-template", str(file), "--ignore-eos") == [ENDLESS, ENDLESS]
        chosen = ("--chat-template", str(file), "--eos-token-ids", str(byte_level().convert_tokens_to_ids("c")))
        assert commands.chat(model, *chosen) == ["abc", "abc"]

    def test_chat_says_which_tokens_end_its_answers(self, turned: Path, commands: Commands) -> None:
        out = commands.run("chat", turned, "--json", stdin=b"Hello!\n")
        ids = byte_level().convert_tokens_to_ids(["</s>", END])
        assert json.loads(out)["config"]["eos_token_ids"] == ids

    def test_python(self, turned: Path) -> None:
        lm = load(turned)
        prompt = lm.encode_chat(MESSAGES)
        assert prompt == lm.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
        ids = lm.tokenizer.convert_tokens_to_ids(["</s>", END])
        assert lm.end_tokens(prompt) == tuple(ids)
        assert lm.end_tokens([89, 90]) == (ids[0],)
        assert texts(lm, [prompt, [89, 90], "x"]) == [ENDED, ENDLESS, ENDLESS]
        rendered = lm.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
        assert texts(lm, rendered) == [ENDED]
        assert texts(lm, lm.tokenizer.apply_chat_template(MESSAGES, tokenize=False)) == [ENDED]
        assert texts(lm, rendered, eos_token_ids=ids[:1]) == [ENDLESS]

    def test_data_sets(self, turned: Path) -> None:
        """Those in chat format are encoded here, for the benchmark, the sweep and verify."""
        lm, config = load(turned), GenerationConfig(max_new_tokens=LENGTH)
        examples = [Example(index=0, prompt=MESSAGES, reference=None), Example(index=1, prompt="x", reference=None)]
        assert texts(lm, encode_examples(lm, examples, config)) == [ENDED, ENDLESS]

    def test_transformers_runs_to_the_same_end(self, turned: Path) -> None:
        from layerskip.evaluation.benchmark.transformers_runner import TransformersRunner

        lm = load(turned)
        runner = TransformersRunner(lm, GenerationConfig(max_new_tokens=LENGTH), early_exit=False)
        assert runner.run(lm.encode_chat(MESSAGES)).text == ENDED
        assert runner.run(lm.encode("x")[0]).text == ENDLESS


class TestEval:
    def write(self, folder: Path, context: str, until: list[str]) -> str:
        pytest.importorskip("lm_eval")
        from lm_eval.api.instance import Instance

        from layerskip.evaluation.eval.model import make_model

        lm = load(folder)
        model = make_model(lm, lm.decoder.num_layers)
        options = {"until": until, "max_gen_toks": LENGTH, "do_sample": False}
        request = Instance(request_type="generate_until", doc={}, arguments=(context, options), idx=0)
        return str(model.generate_until([request])[0])

    def test_it_ends_where_the_others_do(self, silent: Path, turned: Path) -> None:
        assert self.write(silent, "x", ["z"]) == ENDED
        assert self.write(turned, "x", ["z"]) == ENDLESS
        assert (
            self.write(
                turned,
                load(turned).tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True),
                ["z"],
            )
            == ENDED
        )

    def test_a_special_token_as_stop_string(self, turned: Path) -> None:
        assert self.write(turned, "x", [END]) == ENDED
        assert self.write(turned, "x", ["z", f"b{END}"]) == "a"


class TestSpecialTokensAsStopStrings:
    @pytest.mark.parametrize("stops", [[END], ["z", END], [END, "z"], [f"{END}c"], [f"b{END}cd"]])
    def test_every_command_stops_there(self, folder: Callable[..., Path], commands: Commands, stops: list[str]) -> None:
        model = folder(named="</s>", template=CHATML.replace(END, "<|im_start|>"))
        flags = [flag for stop in stops for flag in ("--stop", stop)]
        expected = "a" if stops[-1].startswith("b") else "ab"
        assert commands.generate(model) == ENDLESS
        assert commands.generate(model, *flags) == expected
        assert commands.chat(model, *flags) == [expected, expected]
        assert commands.batch(model, ["x", MESSAGES], *flags) == [expected, expected]

    def test_python(self, turned: Path) -> None:
        lm = load(turned)
        end = lm.tokenizer.convert_tokens_to_ids(END)
        (result,) = lm.generate(["x"], max_new_tokens=LENGTH, stop=("z", END))
        assert (result.text, result.finish_reason, result.stop_reason) == ("ab", "stop", END)
        assert result.token_ids[-1] == end
        assert texts(lm, ["x"], stop=f"b{END}cdc") == ["a"]
        events = list(lm.stream("x", max_new_tokens=LENGTH, stop=(f"b{END}cdc",)))
        assert "".join(event.text for event in events) == "a"
        assert texts(lm, ["x"], stop=f"b{END}x") == [ENDLESS]
        assert texts(lm, ["x"], stop=">") == [ENDLESS]

    def test_one_that_ends_the_text_anyway(self, silent: Path) -> None:
        assert texts(load(silent), ["x"], stop=END) == ["ab"]
        assert texts(load(silent), ["x"], stop=END, ignore_eos=True) == ["ab"]

    def test_written_with_ordinary_tokens(self, tiny_checkpoint: Callable[..., Path]) -> None:
        letters = ["a", *"<|im_end|>", "c"]
        follows = {"x": "a", "a": "<", "<": "|", "|": "e", "e": "n", "n": "d", "d": ">", ">": "c"}
        assert set(follows.values()) <= {"a", "<", "|", "e", "n", "d", ">", "c"} <= set(letters)
        lm = load(write_parrot(tiny_checkpoint, byte_level(), follows))
        assert texts(lm, ["x"], stop="<|end>") == ["a"]
        assert texts(lm, ["x"], stop=["<|end>c", "never"]) == ["a"]


@pytest.mark.parametrize("kind", ["llama2", "mistral", "gemma"])
def test_emoji_and_stop_strings_with_byte_fallback(
    tiny_checkpoint: Callable[..., Path], commands: Commands, kind: str
) -> None:
    """A prompt that ends with emoji, which a tail of its tokens cuts in the middle."""
    emoji = ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    follows = {"<0x80>": "a", "a": emoji[0], **dict(itertools.pairwise(emoji))}
    model = write_parrot(tiny_checkpoint, byte_fallback(kind), follows, generation_config={"eos_token_id": 2})
    lm = load(model)
    assert texts(lm, "hi 😀😀") == ["a😀a😀a"]
    assert texts(lm, "hi 😀😀", stop="😀a😀") == ["a"]
    assert commands.generate(model, prompt="hi 😀😀") == "a😀a😀a"
    assert commands.generate(model, "--stop", "😀", prompt="hi 😀😀") == "a"
    assert commands.batch(model, ["hi 😀😀"], "--stop", "a😀a") == [""]
    shown = [event.text for event in lm.stream("hi 😀😀", max_new_tokens=LENGTH)]
    assert [text for text in shown if text] == ["a", "😀", "a", "😀", "a"]
