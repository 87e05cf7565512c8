"""`layerskip chat`: talk with a model; what was said stays in the cache from turn to turn."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, cast

from layerskip.cli.exit_code import ExitCode
from layerskip.cli.flags.arguments import DecodingArguments, File, ModelArguments, OutputArguments, Text, parse
from layerskip.cli.terminal.prompt_text import drop_line_break, read_text_file, to_text
from layerskip.cli.terminal.terminal import draws, line_history, load_model, make_console, read_line, take_command
from layerskip.decoding.config import GenerationConfig
from layerskip.errors import LayerSkipError, PromptError
from layerskip.files import to_json
from layerskip.text.chat_template import end_of_turn_tokens, render, require_template

if TYPE_CHECKING:
    from rich.console import Console

    from layerskip.cli.terminal.stream import Run
    from layerskip.language_model import LanguageModel

COMMANDS = ("/reset", "/stats", "/quit", "/help")
HELP = """/reset  forget the conversation
/stats  what the last answer cost
/quit   end (so does Ctrl-D)
/help   show this
//...   a message that begins with a slash; only those that are commands need it
Ctrl-C stops an answer; what was said of it stays."""


@dataclass(frozen=True, kw_only=True)
class ChatArguments:
    r"""Talk with a model that has a chat template, by default SmolLM2.

    Without a terminal, each line of standard input is a message.

    Keys and values stay between the turns: only what is new is read. With --json, each turn prints one JSON object.

    Examples:
        layerskip chat --model facebook/layerskip-llama3.2-1B --chat-template template.jinja
        printf 'Hello!\nWhat did I say?\n' | layerskip chat --model ./my-model --system "Be brief." --json
    """

    system: Text = None
    """What the model is told before the conversation."""
    chat_template: File = None
    """File with a Jinja chat template; the tokenizer's own if not given."""
    model: ModelArguments = field(default_factory=lambda: ModelArguments(model="smollm2"))
    decoding: DecodingArguments = field(default_factory=DecodingArguments)
    output: OutputArguments = field(default_factory=OutputArguments)


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    arguments = parse(ChatArguments, "chat", argv)
    template = None
    if arguments.chat_template is not None:
        template = read_text_file("--chat-template", arguments.chat_template)
    system = None if arguments.system is None else to_text(arguments.system, "the text of --system")
    lm = load_model(arguments.model, arguments.output)
    arguments = replace(arguments, decoding=cast("DecodingArguments", lm.configure(arguments.decoding)))
    chat = Chat(Conversation(lm, system, template), arguments)
    if chat.asks:
        with line_history("chat"):
            return chat.run()
    return chat.run()


class Conversation:
    """Messages so far, and the cache that holds them."""

    def __init__(self, lm: "LanguageModel", system: str | None, template: str | None) -> None:
        """Begin.

        Raises:
            TokenizerError: There is no chat template.
            PromptError: The template leaves the system's message out, or refuses it.
        """
        require_template(lm.text_tokenizer, lm.checkpoint.name, template)
        self.lm = lm
        self._template = template
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        if system is not None:
            self._check_system(system)
        ends = (*lm.checkpoint.eos_token_ids, *end_of_turn_tokens(lm.text_tokenizer, template))
        self.end_tokens = tuple(dict.fromkeys(ends))
        """Tokens that end an answer."""
        self.reset()

    def _check_system(self, system: str) -> None:
        """Raise `PromptError` where the template would leave the system's message out."""
        apply = partial(render, self.lm.text_tokenizer, template=self._template, name="a system message (--system)")
        question = {"role": "user", "content": "Hello!"}
        text = apply([*self._opening, question])
        if system.strip() not in text and text == apply([question]):  # it may be there in another spelling
            raise PromptError(
                "the chat template leaves the system message out; say it in the first message instead of --system, or "
                "give a template that knows it: --chat-template FILE"
            )

    def reset(self) -> None:
        """Forget everything but the system's message."""
        self.turns = 0
        self._messages = list(self._opening)
        self.session = self.lm.new_session()

    def prompt(self, message: str) -> list[int]:
        """Token ids of the conversation with a new message, up to where the answer begins.

        Raises:
            PromptError: The context is full, or the template refuses the messages.
            TokenizerError: The template is broken.
        """
        messages = [*self._messages, {"role": "user", "content": message}]
        tokens = self.lm.encode_chat(messages, template=self._template)
        limit = self.lm.decoder.max_context
        if len(tokens) >= limit:
            raise PromptError(
                f"the context is full: the conversation would have {len(tokens)} tokens, and {limit} with the answer "
                "are possible; start a new one (at a terminal: /reset)"
            )
        return tokens

    def add(self, message: str, answer: str) -> None:
        """Keep a turn."""
        self.turns += 1
        self._messages += [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]


class Chat:
    """The conversation's surface: lines in; colours, plain text or JSON out."""

    def __init__(self, conversation: Conversation, arguments: ChatArguments) -> None:
        self._conversation = conversation
        self._lm = conversation.lm
        self._arguments = arguments
        self._config: GenerationConfig = arguments.decoding
        if self._config.eos_token_ids is None:
            self._config = replace(self._config, eos_token_ids=conversation.end_tokens)
        self._draws = draws(arguments.output)
        self.asks = self._draws and sys.stdin.isatty()
        """Whether a user sits at a terminal; otherwise errors end the command."""
        self._last: Run | None = None

    def run(self) -> int:
        """Take lines until they end."""
        if self.asks:
            self._console().print(HELP)
        for line in self._lines():
            # Where nobody sits at a terminal, all that comes is messages.
            command, message = take_command(line, COMMANDS) if self.asks else (None, line)
            if command == "/quit":
                break
            with suppress(KeyboardInterrupt) if self.asks else nullcontext():  # ends what is done, not the command
                if command is not None:
                    self._obey(command)
                elif message.strip() and not self._answer(message):
                    return ExitCode.INTERRUPTED
        return ExitCode.DONE

    def _lines(self) -> Iterator[str]:
        if self.asks:
            while (line := read_line("> ")) is not None:
                yield line
            return
        for content in sys.stdin.buffer:
            stripped = drop_line_break(content)
            if stripped:
                yield to_text(stripped, "a message on standard input")

    def _console(self) -> "Console":
        return make_console(self._arguments.output)

    def _obey(self, command: str) -> None:
        from layerskip.cli.terminal.summary import describe, stats_table

        console = self._console()
        if command == "/reset":
            self._conversation.reset()
            console.print("The conversation is forgotten.", style="dim")
        elif command == "/stats" and self._last is None:
            console.print("Nothing was said yet.", style="dim")
        elif command == "/stats" and self._last is not None:
            result = self._last.result
            console.print(describe(self._lm, self._config, result.seed), style="dim")
            console.print(stats_table(self._last))
            stats = result.stats
            console.print(f"{stats.cached_tokens} of {stats.prompt_tokens} prompt tokens were cached.", style="dim")
        else:
            console.print(HELP)

    def _answer(self, message: str) -> bool:
        """Answer a message; False if the command is to end."""
        try:
            message = to_text(message, "the message")
            turn = self._speak(message)
        except LayerSkipError as error:
            if not self.asks:
                raise
            self._console().print(f"error: {error}", style="bold red")
            return True
        self._last = turn
        self._conversation.add(message, turn.result.text)
        self._report(message, turn)
        return self.asks or not turn.interrupted

    def _speak(self, message: str) -> "Run":
        from layerskip.cli.terminal.stream import follow, ignore, write_plain

        prompt = self._conversation.prompt(message)
        stream = self._lm.stream([prompt], self._config, session=self._conversation.session, show_drafts=self._draws)
        if self._arguments.output.json:
            return follow(stream, ignore)
        if not self._draws:
            turn = follow(stream, write_plain)
            print(flush=True)
            return turn
        from layerskip.cli.terminal.painter import Painter

        painter = Painter(self._console())
        try:
            return follow(stream, painter.draw)
        finally:
            painter.finish()

    def _report(self, message: str, turn: "Run") -> None:
        """What follows an answer: JSON, or on a terminal a line of figures, and a word if the context is full."""
        from layerskip.cli.terminal.summary import result_record

        result, stats = turn.result, turn.result.stats
        if self._arguments.output.json:
            record = result_record(self._lm, self._config, result)
            print(to_json({"turn": self._conversation.turns, "message": message, **record}), flush=True)
        elif self._draws:
            line = f"{stats.tokens} tokens, {turn.tokens_per_second:.1f} tokens/s"
            if stats.drafted:
                line += f", {stats.acceptance_rate:.0%} of drafts accepted"
            self._console().print(line, style="dim")
        if stats.prompt_tokens + stats.tokens >= self._lm.decoder.max_context and result.finish_reason == "length":
            text = f"The context of {self._lm.decoder.max_context} tokens is full"
            text += ": /reset starts a new conversation." if self.asks else "; start a new conversation."
            make_console(self._arguments.output, stderr=not self._draws).print(text, style="yellow")
