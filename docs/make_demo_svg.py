"""Draws docs/demo.svg: what `layerskip demo` shows on a terminal, coloured by where each token came from.

    python docs/make_demo_svg.py

The embedded model generates greedily with a fixed exit layer and draft length, so that the picture doesn't depend on
the machine's speed. Tokens per second are left out for the same reason; `make demo` measures them.
"""

import argparse
import io
from pathlib import Path

from rich.console import Console
from rich.table import Table

import layerskip
from layerskip.cli.demo import CODE
from layerskip.cli.terminal.painter import Painter
from layerskip.cli.terminal.stream import Run, follow, ignore

WIDTH = 88
EXIT_LAYER, NUM_SPECULATIONS = 4, 4
MAX_NEW_TOKENS = 48


def draw(max_new_tokens: int) -> str:
    """Generate after the prompts of `layerskip demo`, and return the terminal's picture as SVG."""
    lm = layerskip.load("demo", device="cpu", dtype="float32")
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    painter = Painter(console)
    painter.legend()
    common = {"max_new_tokens": max_new_tokens, "ignore_eos": True, "do_sample": False}
    plain, drafted = [], []
    for prompt in CODE:
        console.print()
        plain.append(follow(lm.stream(prompt, generation_strategy="autoregressive", **common), ignore))
        painter.prompt(prompt)
        stream = lm.stream(prompt, exit_layer=EXIT_LAYER, num_speculations=NUM_SPECULATIONS, **common)
        drafted.append(follow(stream, painter.draw))
        painter.finish()
    console.print()
    console.print(comparison(plain, drafted))
    return console.export_svg(title="layerskip demo", unique_id="demo")


def comparison(plain: list[Run], drafted: list[Run]) -> Table:
    """Layer calls of both strategies, and what became of the drafts."""
    stats = [run.result.stats for run in drafted]
    accepted, proposed = sum(each.accepted for each in stats), sum(each.drafted for each in stats)
    texts = [[run.result.token_ids for run in runs] for runs in (plain, drafted)]
    calls = [sum(run.result.stats.layer_calls for run in runs) for runs in (plain, drafted)]
    table = Table()
    table.add_column("")
    table.add_column("token by token", justify="right")
    table.add_column(f"exit {EXIT_LAYER}, {NUM_SPECULATIONS} drafts", justify="right")
    table.add_row("layer calls", *(f"{number:,}" for number in calls))
    table.add_row("drafts accepted", "", f"{accepted} of {proposed}")
    table.add_row("same text", "", "yes" if texts[0] == texts[1] else "NO")
    return table


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("demo.svg"))
    parser.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS)
    arguments = parser.parse_args()
    arguments.output.write_text(draw(arguments.max_new_tokens), encoding="utf-8")


if __name__ == "__main__":
    main()
