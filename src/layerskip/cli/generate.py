"""`layerskip generate`: write after a prompt, streaming, and show what speculation did."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from layerskip.cli.exit_code import ExitCode
from layerskip.cli.flags.arguments import DecodingArguments, File, ModelArguments, OutputArguments, Switch, Text, parse
from layerskip.cli.terminal.prompt_text import drop_line_break, read_text_file, to_text
from layerskip.cli.terminal.terminal import (
    draws,
    line_history,
    load_model,
    make_console,
    progress,
    read_line,
    take_command,
)
from layerskip.errors import InvalidArgumentError, LayerSkipError
from layerskip.files import to_json

if TYPE_CHECKING:
    from layerskip.cli.terminal.stream import Run
    from layerskip.language_model import LanguageModel

COMMANDS = ("/help", "/quit")
HELP = (
    "Type a prompt, and the model writes on. Ctrl-C stops the text; /quit or Ctrl-D ends; /help shows this. "
    "A prompt that is called like a command begins with two slashes."
)


@dataclass(frozen=True, kw_only=True)
class GenerateArguments:
    """Write after a prompt: --prompt, --prompt-file or standard input; without any, ask for prompts on a terminal.

    A terminal shows accepted and corrected drafts in colours, then a table that compares with autoregressive decoding.
    Elsewhere the text comes plain, or as one JSON object with --json.

    Examples:
        layerskip generate --prompt "def add(a, b):" --exit-layer 4 --num-speculations 6
        layerskip generate --prompt-file prompt.txt --sample --temperature 0.7 --seed 1 --json
        layerskip generate --prompt "def add(a, b):" --explain
    """

    prompt: Text = None
    """Text to continue."""
    prompt_file: File = None
    """File with the text to continue, in UTF-8; one line break at its end is dropped."""
    compare: bool | None = None
    """Also decode without drafts, and compare; on a terminal if not given."""
    explain: Switch = False
    """Say why exit and draft length were chosen, and why there is no speedup where there is none."""
    model: ModelArguments = field(default_factory=ModelArguments)
    decoding: DecodingArguments = field(default_factory=DecodingArguments)
    output: OutputArguments = field(default_factory=OutputArguments)


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    arguments = parse(GenerateArguments, "generate", argv)
    if arguments.explain and arguments.decoding.strategy != "adaptive":
        raise InvalidArgumentError(
            "--explain tells why the adaptive strategy chose what it chose; leave out --generation-strategy, "
            "--exit-layer and --num-speculations"
        )
    prompt = read_prompt(arguments)
    lm = load_model(arguments.model, arguments.output)
    arguments = replace(arguments, decoding=cast("DecodingArguments", lm.configure(arguments.decoding)))
    if prompt is None:
        return _ask_for_prompts(lm, arguments)
    return _answer(lm, prompt, arguments)


def read_prompt(arguments: GenerateArguments) -> str | None:
    """The prompt, wherever it comes from; None if the user is to be asked.

    Raises:
        InvalidArgumentError: There is no prompt, or more than one.
        PromptError: It is empty, or isn't text.
    """
    if arguments.prompt is not None and arguments.prompt_file is not None:
        raise InvalidArgumentError("--prompt and --prompt-file were both given; give one of them")
    if arguments.prompt is not None:
        return to_text(arguments.prompt, "the text of --prompt")
    if arguments.prompt_file is not None:
        return read_text_file("--prompt-file", arguments.prompt_file)
    if not sys.stdin.isatty():
        return to_text(drop_line_break(sys.stdin.buffer.read()), "the prompt on standard input")
    if not draws(arguments.output):
        raise InvalidArgumentError(
            "there is no prompt; give --prompt TEXT, --prompt-file FILE or text on standard input (prompts are asked "
            "for only where input and output are a terminal, without --json)"
        )
    return None


def _answer(lm: "LanguageModel", prompt: str, arguments: GenerateArguments) -> int:
    """Write after one prompt, in the way that suits the output."""
    if arguments.output.json:
        return _write_json(lm, prompt, arguments)
    if draws(arguments.output):
        return _draw(lm, prompt, arguments, show_prompt=True)
    return _write_plain(lm, prompt, arguments)


def _write_json(lm: "LanguageModel", prompt: str, arguments: GenerateArguments) -> int:
    from layerskip.cli.terminal.stream import follow, ignore
    from layerskip.cli.terminal.summary import compare, is_same_text, result_record, warm_up

    config = arguments.decoding
    if arguments.compare:
        warm_up(lm, prompt, config)
    run = follow(lm.stream(prompt, config), ignore)
    record: dict[str, Any] = {"prompt": prompt, **result_record(lm, config, run.result, prompt)}
    if arguments.explain and (explanation := run.explain()) is not None:
        record["explanation"] = asdict(explanation)
    if arguments.compare and not run.interrupted:
        reference = compare(lm, prompt, config, run.result.seed)
        record["autoregressive"] = result_record(lm, config, reference.result)["stats"]
        record["speedup"] = run.tokens_per_second / reference.tokens_per_second
        record["same_text"] = is_same_text(config, run.result.token_ids, reference.result.token_ids)
    print(to_json(record))
    return ExitCode.INTERRUPTED if run.interrupted else ExitCode.DONE


def _write_plain(lm: "LanguageModel", prompt: str, arguments: GenerateArguments) -> int:
    from layerskip.cli.terminal.stream import follow, write_plain
    from layerskip.cli.terminal.summary import warm_up

    if arguments.compare:
        warm_up(lm, prompt, arguments.decoding)
    run = follow(lm.stream(prompt, arguments.decoding), write_plain)
    print(flush=True)
    if run.interrupted:
        return ExitCode.INTERRUPTED
    if arguments.compare:
        _show_table(lm, prompt, arguments, run, stderr=True)
    _show_explanation(arguments, run, stderr=True)
    return ExitCode.DONE


def _draw(lm: "LanguageModel", prompt: str, arguments: GenerateArguments, *, show_prompt: bool) -> int:
    from layerskip.cli.terminal.painter import Painter
    from layerskip.cli.terminal.stream import follow
    from layerskip.cli.terminal.summary import warm_up

    config = arguments.decoding
    painter = Painter(make_console(arguments.output))
    if _compares(arguments):
        warm_up(lm, prompt, config)
    if show_prompt:
        if config.speculates:
            painter.legend()
        painter.prompt(prompt)
    try:
        run = follow(lm.stream(prompt, config, show_drafts=True), painter.draw)
    finally:
        painter.finish()
    _show_table(lm, prompt, arguments, run)
    _show_explanation(arguments, run)
    return ExitCode.INTERRUPTED if run.interrupted else ExitCode.DONE


def _compares(arguments: GenerateArguments) -> bool:
    return arguments.decoding.speculates if arguments.compare is None else arguments.compare


def _show_table(
    lm: "LanguageModel", prompt: str, arguments: GenerateArguments, run: "Run", *, stderr: bool = False
) -> None:
    from layerskip.cli.terminal.summary import compare, describe, difference, is_same_text, stats_table

    config, reference, same = arguments.decoding, None, None
    if _compares(arguments) and not run.interrupted:
        with progress(arguments.output, "decoding again without drafts, to compare"):
            reference = compare(lm, prompt, config, run.result.seed)
        same = is_same_text(config, run.result.token_ids, reference.result.token_ids)
        if reference.interrupted:
            reference = None
    console = make_console(arguments.output, stderr=stderr)
    console.print(describe(lm, config, run.result.seed), style="dim")
    console.print(stats_table(run, reference, same_text=same))
    if reference is not None and same is False:
        console.print(difference(run.result.token_ids, reference.result.token_ids), style="bold red")


def _show_explanation(arguments: GenerateArguments, run: "Run", *, stderr: bool = False) -> None:
    from layerskip.cli.terminal.summary import explanation_lines

    if arguments.explain and (explanation := run.explain()) is not None:
        console = make_console(arguments.output, stderr=stderr)
        for line in explanation_lines(explanation):
            console.print(line, highlight=False)


def _ask_for_prompts(lm: "LanguageModel", arguments: GenerateArguments) -> int:
    from layerskip.cli.terminal.painter import Painter

    console = make_console(arguments.output)
    console.print(HELP)
    Painter(console).legend()
    with line_history("generate"):
        while (line := read_line("> ")) is not None:
            command, prompt = take_command(line, COMMANDS)
            if command == "/quit":
                break
            if command == "/help":
                console.print(HELP)
            elif prompt:
                with suppress(KeyboardInterrupt):  # ends what is being done, not the command
                    _write_after(lm, prompt, arguments)
    return ExitCode.DONE


def _write_after(lm: "LanguageModel", prompt: str, arguments: GenerateArguments) -> None:
    """Write after a prompt that was asked for; what is wrong with it doesn't end the command."""
    try:
        _draw(lm, to_text(prompt, "the prompt"), arguments, show_prompt=False)
    except LayerSkipError as error:
        make_console(arguments.output).print(f"error: {error}", style="bold red")
