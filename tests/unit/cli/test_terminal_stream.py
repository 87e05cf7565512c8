"""What is drawn, as a small screen shows it: drafts come and go, and the text stays."""

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

import layerskip
from layerskip.cli.terminal.painter import Painter
from layerskip.cli.terminal.stream import follow
from layerskip.decoding.output.events import DraftEvent, Source, StreamEvent, TokenEvent

TOKEN = re.compile(r"\x1b\[(?P<arguments>[\d;?]*)(?P<command>[A-Za-z])|(?P<text>.|\n)")


class Screen:
    """A terminal of a few control codes; a row's last column holds the cursor until something follows."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.rows: list[list[str]] = [[]]
        self.column = 0
        self.styles: set[str] = set()

    def feed(self, output: str) -> None:
        for match in TOKEN.finditer(output):
            arguments, command = match["arguments"], match["command"]
            if command == "m":
                self.styles.add(arguments)
            elif command == "D":
                self.column = max(0, min(self.column, self.width - 1) - int(arguments or 1))
            elif command == "K":
                assert arguments in ("", "0")
                del self.rows[-1][self.column :]
            elif match["text"] == "\n":
                self.rows.append([])
                self.column = 0
            else:
                assert match["text"], f"unknown control code {match[0]!r}"
                self._put(match["text"])

    def _put(self, character: str) -> None:
        assert character >= " ", f"control character {character!r}"
        cells = cell_len(character)
        if self.column + cells > self.width:
            self.rows.append([])
            self.column = 0
        row = self.rows[-1]
        row[self.column :] = [character, *[""] * (cells - 1)]
        self.column += cells

    @property
    def lines(self) -> list[str]:
        return ["".join(row) for row in self.rows]


class Terminal:
    def __init__(self, width: int = 20) -> None:
        self.stream, self.screen = io.StringIO(), Screen(width)
        console = Console(
            file=self.stream, force_terminal=True, width=width, color_system="standard", highlight=False, _environ={}
        )
        self.painter = Painter(console)

    def draw(self, *events: StreamEvent) -> list[str]:
        for event in events:
            self.painter.draw(event)
        return self.update()

    def update(self) -> list[str]:
        self.screen.feed(self.stream.getvalue())
        self.stream.seek(0)
        self.stream.truncate()
        return self.screen.lines


def draft(text: str) -> DraftEvent:
    return DraftEvent(index=0, token_ids=(), text=text, drafter="early_exit")


def token(text: str, source: Source = "accepted") -> TokenEvent:
    return TokenEvent(index=0, token_id=0, text=text, source=source)


def test_drafts_are_taken_back() -> None:
    terminal = Terminal()
    assert terminal.draw(token("one")) == ["one"]
    assert terminal.draw(draft(" two three")) == ["one two three"]
    assert terminal.draw(token(" two"), token(" 3", "corrected")) == ["one two 3"]
    assert terminal.draw(draft(" four")) == ["one two 3 four"]
    terminal.painter.finish()
    assert terminal.update() == ["one two 3", ""]


def test_line_breaks_of_drafts_are_shown_on_their_row() -> None:
    terminal = Terminal()
    assert terminal.draw(token("a"), draft("b\n\tc")) == ["ab↵→c"]
    assert terminal.draw(token("b"), token("\n\tc")) == ["ab", "        c"]


@pytest.mark.parametrize("written", range(0, 21))
@pytest.mark.parametrize("drafted", ["abcdefghijklmnopqrstuvwxyz", "漢字漢字漢字漢字漢字漢字漢字", "x", "é́́é́é"])
def test_drafts_stay_on_the_row_at_every_column(written: int, drafted: str) -> None:
    terminal = Terminal(20)
    before = list(terminal.draw(token("." * written)))
    during = terminal.draw(draft(drafted))
    assert len(during) == len(before)
    assert cell_len(during[0]) <= max(written, 19)
    assert terminal.draw(draft("")) == before


def test_wide_characters_wrap_as_on_a_terminal() -> None:
    terminal = Terminal(5)
    assert terminal.draw(token("漢字漢字"), draft("字")) == ["漢字", "漢字"]
    assert terminal.draw(token("a"), token("b"), draft("cd")) == ["漢字", "漢字a", "bcd"]
    assert terminal.draw(token("!")) == ["漢字", "漢字a", "b!"]


def test_tabs_reach_the_next_stop_and_no_further_than_the_row() -> None:
    terminal = Terminal(20)
    assert terminal.draw(token("ab\tc\td\te")) == ["ab      c       d   ", "e"]
    assert terminal.draw(draft("xyz")) == ["ab      c       d   ", "exyz"]
    assert terminal.draw(token("!")) == ["ab      c       d   ", "e!"]


def test_control_characters_of_the_text_are_pictures() -> None:
    terminal = Terminal()
    assert terminal.draw(token("a\x1b[2Jb\r\x7f")) == ["a␛[2Jb␍␡"]
    assert terminal.draw(draft("\x1b[1D")) == ["a␛[2Jb␍␡␛[1D"]


def test_styles_tell_sources_apart() -> None:
    terminal = Terminal()
    terminal.draw(token("a", "accepted"))
    assert terminal.screen.styles == {"32", "0"}
    terminal.draw(token("b", "corrected"))
    assert terminal.screen.styles == {"32", "0", "1;33"}
    terminal.draw(token("c", "bonus"), token("d", "decoded"), draft("e"))
    assert terminal.screen.styles == {"32", "0", "1;33", "2"}


def test_markup_in_texts_is_text() -> None:
    terminal = Terminal(40)
    terminal.painter.prompt("[bold]:smile:")
    assert terminal.draw(token("[/red]")) == ["[bold]:smile:[/red]"]


@pytest.mark.parametrize("width", [7, 20, 33, 80])
def test_a_drawn_generation_is_its_text(width: int) -> None:
    lm = layerskip.load("demo")
    prompt = "class Stack:\n\tdef push(self, item):\n"
    drawn, plain = Terminal(width), Terminal(width)
    drawn.painter.prompt(prompt)
    run = follow(lm.stream(prompt, max_new_tokens=60, num_speculations=4, show_drafts=True), drawn.painter.draw)
    assert run.seconds > 0
    assert run.result.stats.accepted < run.result.stats.drafted
    plain.painter.prompt(prompt + run.result.text)
    assert drawn.update() == plain.update()


def test_control_c_while_drawing_keeps_what_was_written() -> None:
    lm = layerskip.load("demo")
    seen: list[StreamEvent] = []

    def interrupt(event: StreamEvent) -> None:
        seen.append(event)
        if len(seen) == 5:
            raise KeyboardInterrupt

    run = follow(lm.stream("def f(", max_new_tokens=60), interrupt)
    assert run.interrupted
    assert 5 <= run.result.stats.tokens < 60
    assert run.tokens_per_second > 0
