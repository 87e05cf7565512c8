"""`layerskip chat`: talk with a model; what was said stays in the cache from turn to turn."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

from layerskip.cli.arguments import DecodingArguments, File, ModelArguments, OutputArguments, Text, parse
from layerskip.cli.exit_code import ExitCode
from layerskip.cli.prompt_text import drop_line_break, read_text_file, to_text
from layerskip.cli.terminal import draws, line_history, load_model, make_console, read_line
from layerskip.errors import LayerSkipError, PromptError, TokenizerError

if TYPE_CHECKING:
    from rich.console import Console

    from layerskip.cli.terminal_stream import Run
    from layerskip.language_model import LanguageModel

HELP = """/reset  forget the conversation
/stats  what the last answer cost
/quit   end (so does Ctrl-D)
/help   show this
Ctrl-C stops an answer; what was said of it stays."""


@dataclass(frozen=True, kw_only=True)
class ChatArguments:
    r"""Talk with a model that has a chat template; without a terminal, standard input holds one message a line.

    Keys and values stay between the turns: only what is new is read. With --json, each turn prints one JSON object.

    Examples:
        layerskip chat --model facebook/layerskip-llama3.2-1B --chat-template template.jinja
        printf 'Hello!\nWhat did I say?\n' | layerskip chat --model ./my-model --system "Be brief." --json
    """

    system: Text = None
    """What the model is told before the conversation."""
    chat_template: File = None
    """File with a Jinja chat template; the tokenizer's own if not given."""
    model: ModelArguments = field(default_factory=ModelArguments)
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
        """
        self.lm = lm
        self._template = template
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        if template is None and not lm.tokenizer.chat_template:
            raise TokenizerError(
                f"the tokenizer of {lm.checkpoint.name!r} has no chat template; give one with --chat-template FILE "
                "(Jinja), or let the model continue a text with layerskip generate"
            )
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system's message."""
        self.turns = 0
        self._messages = list(self._opening)
        self.session = self.lm.new_session()

    def prompt(self, message: str) -> list[int]:
        """Token ids of the conversation with a new message, up to where the answer begins.

        Raises:
            PromptError: The context is full.
            TokenizerError: The template refuses the messages.
        """
        messages = [*self._messages, {"role": "user", "content": message}]
        try:
            text = self.lm.tokenizer.apply_chat_template(
                messages, chat_template=self._template, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates are programs: Jinja's errors and nearly any other
            raise TokenizerError(f"the chat template can't be applied: {error}") from error
        (tokens,) = self.lm.encode([str(text)], special_tokens=False)
        limit = self.lm.decoder.max_context
        if len(tokens) >= limit:
            raise PromptError(
                f"the context is full: the conversation would have {len(tokens)} tokens, and {limit} with the answer "
                "are possible; /reset starts a new one"
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
        self._draws = draws(arguments.output)
        self.asks = self._draws and sys.stdin.isatty()
        """Whether a user sits at a terminal; otherwise errors end the command."""
        self._last: Run | None = None

    def run(self) -> int:
        """Take lines until they end."""
        if self.asks:
            self._console().print(HELP)
        for line in self._lines():
            if line.strip() == "/quit":
                break
            with suppress(KeyboardInterrupt) if self.asks else nullcontext():  # ends what is done, not the command
                if not self._take(line):
                    return ExitCode.INTERRUPTED
        return ExitCode.DONE

    def _take(self, line: str) -> bool:
        """Obey a command or answer a message; False if the command is to end."""
        command = line.strip()
        if command.startswith("/"):
            self._obey(command)
        return not command or command.startswith("/") or self._answer(line)

    def _lines(self) -> Iterator[str]:
        if self.asks:
            while (line := read_line("> ")) is not None:
                yield line
            return
        for content in sys.stdin.buffer:
            stripped = drop_line_break(content)
            if stripped:
                yield to_text(stripped, "a message on standard input")

    def _console(self, *, notes: bool = False) -> "Console":
        """Where to print; notes go to standard error where standard output holds nothing but answers."""
        return make_console(self._arguments.output, stderr=notes and not self._draws)

    def _obey(self, command: str) -> None:
        from layerskip.cli.summary import describe, stats_table

        notes = self._console(notes=True)
        if command == "/reset":
            self._conversation.reset()
            notes.print("The conversation is forgotten.", style="dim")
        elif command == "/stats" and self._last is None:
            notes.print("Nothing was said yet.", style="dim")
        elif command == "/stats" and self._last is not None:
            result = self._last.result
            notes.print(describe(self._lm, self._arguments.decoding, result.seed), style="dim")
            notes.print(stats_table(self._last))
            stats = result.stats
            notes.print(f"{stats.cached_tokens} of {stats.prompt_tokens} prompt tokens were cached.", style="dim")
        else:
            notes.print(HELP if command == "/help" else f"{command} is not a command\n{HELP}")

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
        from layerskip.cli.terminal_stream import Painter, follow, ignore, write_plain

        prompt = self._conversation.prompt(message)
        stream = self._lm.stream(
            [prompt], self._arguments.decoding, session=self._conversation.session, show_drafts=self._draws
        )
        if self._arguments.output.json:
            return follow(stream, ignore)
        if not self._draws:
            turn = follow(stream, write_plain)
            print(flush=True)
            return turn
        painter = Painter(self._console())
        try:
            return follow(stream, painter.draw)
        finally:
            painter.finish()

    def _report(self, message: str, turn: "Run") -> None:
        """What follows an answer: JSON, or on a terminal a line of figures, and a word if the context is full."""
        from layerskip.cli.summary import result_record

        result, stats = turn.result, turn.result.stats
        if self._arguments.output.json:
            record = result_record(self._lm, self._arguments.decoding, result)
            print(json.dumps({"turn": self._conversation.turns, "message": message, **record}), flush=True)
        elif self._draws:
            line = f"{stats.tokens} tokens, {turn.tokens_per_second:.1f} tokens/s"
            if stats.drafted:
                line += f", {stats.acceptance_rate:.0%} of drafts accepted"
            self._console().print(line, style="dim")
        if stats.prompt_tokens + stats.tokens >= self._lm.decoder.max_context and result.finish_reason == "length":
            text = f"The context of {self._lm.decoder.max_context} tokens is full: /reset starts a new conversation."
            self._console(notes=True).print(text, style="yellow")
