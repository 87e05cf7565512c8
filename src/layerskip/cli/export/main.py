"""`layerskip export`: finds the subcommand and runs it.

A subcommand is one line in `SUBCOMMANDS` and a module of its name in this folder, with a function `run` as in
`layerskip.cli.main`.
"""

from collections.abc import Sequence
from importlib import import_module

from layerskip.cli.exit_code import ExitCode
from layerskip.errors import InvalidArgumentError

SUBCOMMANDS = {
    "draft": "the first layers as a checkpoint: a draft model for other engines",
    "gguf": "a GGUF file for llama.cpp: the model, or its first layers",
    "transformers": "code that transformers runs: self-speculative decoding without this package",
    "merge": "a model and its exit adapters in one folder",
    "split": "a model's exit adapters in a folder of their own",
    "push": "upload to the Hugging Face hub, with a model card of what was measured",
}


def run(argv: Sequence[str]) -> int:
    """Run the subcommand that the first argument names."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return ExitCode.DONE
    name, *rest = argv
    if name not in SUBCOMMANDS:
        kind = "option" if name.startswith("-") else "subcommand"
        raise InvalidArgumentError(f"unknown {kind} {name!r} of export; use {', '.join(SUBCOMMANDS)}, or --help")
    code: int = import_module(module_of(name)).run(rest)
    return code


def module_of(subcommand: str) -> str:
    """Name of the module that runs a subcommand."""
    return f"layerskip.cli.export.{subcommand}"


def overview() -> str:
    """What `layerskip export --help` prints."""
    width = max(map(len, SUBCOMMANDS))
    return "\n".join(
        [
            "usage: layerskip export SUBCOMMAND [OPTIONS]",
            "",
            "Write a model, or parts of it, in the forms that other programs read.",
            "",
            "subcommands:",
            *(f"  {name:{width}}  {line}" for name, line in SUBCOMMANDS.items()),
            "",
            "layerskip export SUBCOMMAND --help shows a subcommand's options.",
            "",
            "Example: layerskip export draft --model demo --exit-layer 4 --output demo-draft",
        ]
    )
