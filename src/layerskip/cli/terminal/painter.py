"""A generation drawn on a terminal: colours, and drafts that come and go."""

from rich.cells import cell_len
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

from layerskip.decoding.output.events import DraftEvent, Source, StreamEvent, TokenEvent

STYLES: dict[Source, str] = {"accepted": "green", "corrected": "bold yellow", "bonus": "", "decoded": ""}
PROMPT_STYLE, DRAFT_STYLE = "bold", "dim"
TAB = 8
CONTROL_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "␡"}
"""Control characters of a model's text are shown, never sent to the terminal."""
DRAFT_PICTURES = CONTROL_PICTURES | {ord("\n"): "↵", ord("\t"): "→"}


class Painter:
    """Draws a generation on a terminal, knowing where the cursor stands.

    Drafts are shown on the rest of the cursor's row only, and never up to its last column: there, terminals disagree
    about where the cursor is, and on one row a few steps back and "clear to the end of line" take everything back.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._column = 0
        self._draft_width = 0

    def legend(self) -> None:
        """Say what the colours mean."""
        line = Text.assemble(
            ("colours: ", "dim"),
            ("accepted draft", STYLES["accepted"]),
            "  ",
            ("corrected draft", STYLES["corrected"]),
            "  own token  ",
            ("draft to be verified", DRAFT_STYLE),
        )
        self._console.print(line)

    def prompt(self, text: str) -> None:
        """Show the prompt, which the generation continues."""
        self._write(text, PROMPT_STYLE)

    def draw(self, event: StreamEvent) -> None:
        """Show an event."""
        self._erase_draft()
        if isinstance(event, DraftEvent):
            self._show_draft(event.text)
        else:
            self._write(event.text, STYLES[event.source] if isinstance(event, TokenEvent) else "")

    def finish(self) -> None:
        """End the text's last line."""
        self._erase_draft()
        if self._column:
            self._console.print()
        self._column = 0

    def _write(self, text: str, style: str) -> None:
        shown = self._advance(text.translate(CONTROL_PICTURES))
        if shown:
            self._print(shown, style)

    def _advance(self, text: str) -> str:
        """Move the known column along a text, and return it with tabs as spaces."""
        width, shown = self._console.width, []
        for character in text:
            cells = cell_len(character)
            if character == "\n" or self._column + max(cells, character == "\t") > width:
                self._column = 0
            if character == "\t":
                cells = min(TAB - self._column % TAB, width - self._column)
                character = " " * cells
            if character != "\n":
                self._column += cells
            shown.append(character)
        return "".join(shown)

    def _show_draft(self, text: str) -> None:
        room, shown = self._console.width - 1 - self._column, ""
        for character in text.translate(DRAFT_PICTURES):
            cells = cell_len(character)
            if self._draft_width + cells > room:
                break
            shown += character
            self._draft_width += cells
        if shown:
            self._print(shown, DRAFT_STYLE)

    def _erase_draft(self) -> None:
        if self._draft_width:
            back = (ControlType.CURSOR_BACKWARD, self._draft_width)
            self._console.control(Control(back, (ControlType.ERASE_IN_LINE, 0)))
            self._draft_width = 0

    def _print(self, text: str, style: str) -> None:
        self._console.print(Text(text, style), end="", soft_wrap=True)
        self._console.file.flush()
