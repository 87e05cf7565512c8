"""The heat map of a grid of settings as SVG, with its numbers in the cells."""

from collections.abc import Mapping
from dataclasses import dataclass

from layerskip.evaluation.report.page import Html, tag
from layerskip.evaluation.report.plots import CHARACTER, colour, drawing, text

ROW = 34
"""Pixels of a row's height."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One setting."""

    value: float
    shown: str
    """The value as text in the cell."""
    title: str
    """Everything known about the setting, as a tooltip."""


def heat_map(
    cells: Mapping[tuple[int, int], Cell],
    width: float,
    title: str,
    *,
    rows: str,
    columns: str,
    best: tuple[int, int] | None,
    ends: tuple[str, str],
) -> Html:
    """A grid whose cells have a stronger colour for larger values; wider than asked for if the numbers need it.

    Args:
        cells: Cells by row and column; some may be missing.
        width: Pixels of the drawing's width.
        title: Name of the drawing.
        rows: Name of the rows.
        columns: Name of the columns.
        best: The cell that gets a frame.
        ends: The smallest and the largest value as text, for the scale.
    """
    row_names, column_names = sorted({r for r, _ in cells}), sorted({c for _, c in cells})
    values = [cell.value for cell in cells.values()]
    smallest, span = min(values), (max(values) - min(values)) or 1
    left, top = 18 + CHARACTER * max(len(str(name)) for name in row_names), 48.0
    least = 14 + CHARACTER * max(len(cell.shown) for cell in cells.values())
    size = max(least, min((width - left) / len(column_names), 110))
    bottom = top + ROW * len(row_names)
    marks = [text(0, 13, f"{rows} (down), {columns} (across)", "muted")]
    marks += [text(left + size * (x + 0.5), top - 10, str(c), "muted", "middle") for x, c in enumerate(column_names)]
    marks += [text(left - 10, top + ROW * (y + 0.62), str(r), "muted", "end") for y, r in enumerate(row_names)]
    frame: list[Html] = []
    for y, row in enumerate(row_names):
        for x, column in enumerate(column_names):
            cell = cells.get((row, column))
            if cell is None:
                continue
            strength = (cell.value - smallest) / span
            marks.append(_cell(cell, left + size * x, top + ROW * y, size, strength))
            if (row, column) == best:
                frame.append(tag("rect", class_="best", **_box(left + size * x, top + ROW * y, size)))
    scale = _scale(left, bottom + 18, ends)
    whole = max(left + size * len(column_names), left + 140 + CHARACTER * len(ends[1]), 280)
    described = "; ".join(cell.title for _, cell in sorted(cells.items(), key=lambda item: item[0]))
    return _fit(drawing(whole, bottom + 36, title, described, marks, frame, scale), whole)


def _cell(cell: Cell, x: float, y: float, size: float, strength: float) -> Html:
    """A filled rectangle with its number."""
    fill = tag("rect", style=colour("heat"), fill_opacity=_opacity(strength), **_box(x, y, size))
    number = text(x + size / 2, y + 0.62 * ROW, cell.shown, None, "middle")
    return tag("g", tag("title", cell.title), fill, number)


def _box(x: float, y: float, size: float) -> dict[str, float]:
    """Place and size of a cell's rectangle; cells are a pixel apart."""
    return {"x": x, "y": y, "width": size - 1, "height": ROW - 1}


def _opacity(strength: float) -> float:
    """Opacity for a value between 0 and 1, low enough for numbers on it to stay readable."""
    return 0.05 + 0.6 * strength


def _scale(x: float, y: float, ends: tuple[str, str]) -> list[Html]:
    """The scale of colours from the smallest to the largest value."""
    start = x + CHARACTER * len(ends[0]) + 8
    steps = [
        tag("rect", x=start + 12 * i, y=y, width=12, height=12, style=colour("heat"), fill_opacity=_opacity(i / 10))
        for i in range(11)
    ]
    return [text(x, y + 11, ends[0], "muted"), *steps, text(start + 140, y + 11, ends[1], "muted")]


def _fit(svg: Html, width: float) -> Html:
    """A style that shows the drawing at its own size, so that numbers stay readable."""
    return tag("div", svg, style=f"width:{width:.0f}px")
