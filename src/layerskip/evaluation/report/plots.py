"""Bars, stacked bars, lines and scatter plots as SVG, with colours from the page's style sheet, so that themes apply.

Every mark has its numbers as a title, which browsers show and screen readers read. Lengths are in pixels of the
drawing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from layerskip.evaluation.report.numbers import count, significant, tick
from layerskip.evaluation.report.page import Html, tag

COLOURS = 7
"""Number of colours of series in the style sheet, from s0 on; further series repeat them with other marks and
dashes."""
DASHES = (None, "7 4", "2 3", "9 3 2 3")
CHARACTER = 7.8
"""Pixels of a character's width, at most, by which texts are cut and placed."""

Point = tuple[float, float]
Format = Callable[[float], str]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar of a plot."""

    name: str
    detail: str = ""
    """A second, smaller text."""
    value: float | None
    """Length of the bar; None shows a dash."""
    label: str
    """The value as text."""
    low: float | None = None
    """Ends of an interval around the value."""
    high: float | None = None
    tone: str = "accent"
    """Name of a colour in the style sheet."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One stacked bar of shares."""

    name: str
    detail: str = ""
    parts: Sequence[tuple[str, float, str]]
    """Name, share of the whole and colour."""
    label: str
    """The text at the end of the bar."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line of a plot."""

    name: str
    points: Sequence[Point]


def drawing(width: float, height: float, title: str, description: str, *content: Html | Sequence[Html]) -> Html:
    """An SVG with a name and a description for screen readers."""
    name, long = tag("title", title), tag("desc", description)
    box = f"0 0 {width:.0f} {height:.0f}"
    return tag("svg", name, long, *content, viewBox=box, role="img", style=f"min-width:{width:.0f}px;" * (width < 400))


def text(x: float, y: float, content: str, kind: str | None = None, anchor: str | None = None) -> Html:
    """A text; `anchor` is middle or end."""
    return tag("text", content, x=x, y=y, class_=kind, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Html:
    """A straight line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def colour(name: str) -> str:
    """A colour of the style sheet, for a style attribute."""
    return f"fill:var(--{name})"


def cut(content: str, width: float) -> str:
    """A text cut to a width."""
    room = max(1, int(width / CHARACTER))
    return content if len(content) <= room else content[: room - 1] + "…"


def _rows(items: Sequence[Bar | Stack], width: float) -> tuple[float, float, float, float]:
    """The layout of bars: left edge, height of a row, top of the bar within it, room for labels at the end."""
    labels = CHARACTER * max((len(item.label) for item in items), default=0) + 16
    if width < 500:  # names are above their bars
        return 0, 62, 26, min(labels, 0.4 * width)
    names = max((max(len(item.name), 0.95 * len(item.detail)) for item in items), default=0)
    return min(CHARACTER * names + 20, 0.34 * width), 54, 10, labels


def _names(item: Bar | Stack, top: float, left: float, width: float) -> list[Html]:
    if not left:
        whole = cut(f"{item.name}  {item.detail}", width)
        name, detail = whole[: len(item.name)], whole[len(item.name) :]
        return [tag("text", name, tag("tspan", detail, class_="muted"), x=0, y=top + 17)]
    names = [text(0, top + (22 if item.detail else 29), cut(item.name, left - 8))]
    if item.detail:
        names.append(text(0, top + 40, cut(item.detail, left - 8), "muted"))
    return names


def bars(items: Sequence[Bar], width: float, title: str, *, base: float | None = None) -> Html:
    """A plot with a bar from 0 to each value, and its interval.

    Args:
        items: Bars, from the top.
        width: Pixels of the drawing's width.
        title: Name of the drawing.
        base: A value that is marked by a vertical line.
    """
    left, step, offset, room = _rows(items, width)
    largest = max([base or 0, *(item.high or item.value or 0 for item in items), *(b.value or 0 for b in items)])
    scale = (width - left - room) / largest if largest > 0 else 0
    marks: list[Html] = []
    for place, item in enumerate(items):
        top, middle = place * step, place * step + offset + 14
        marks += _names(item, top, left, width)
        end = left + scale * max(item.value or 0, 0)
        ends = [scale * bound + left for bound in (item.low, item.high) if bound is not None]
        group = [tag("title", f"{item.name} {item.detail}: {item.label}")]
        if item.value is not None:
            rectangle = tag(
                "rect", x=left, y=top + offset, width=max(end - left, 1), height=28, style=colour(item.tone)
            )
            group.append(rectangle)
        if len(ends) == 2 and item.value is not None:
            group += [line(ends[0], middle, ends[1], middle, kind) for kind in ("halo", "whisker")]
            group += [line(x, middle - 5, x, middle + 5, "whisker") for x in ends]
        marks.append(tag("g", group))
        marks.append(text(max([end, *ends]) + 10, middle + 5, item.label, "strong"))
        if base is not None and scale:
            start, stop = (top, top + step) if left else (top + offset - 4, top + offset + 32)  # not across names
            marks.append(line(left + scale * base, start, left + scale * base, stop, "diagonal"))
    description = "; ".join(f"{item.name} {item.detail}: {item.label}" for item in items)
    return drawing(width, max(1, len(items)) * step, title, description, marks)


def stacks(items: Sequence[Stack], width: float, title: str) -> Html:
    """A plot with a bar of parts for each item; all bars are equally long."""
    left, step, offset, room = _rows(items, width)
    length = width - left - room
    marks: list[Html] = []
    for place, item in enumerate(items):
        top, x = place * step, left
        marks += _names(item, top, left, width)
        for name, share, tone in item.parts:
            size = share * length
            shown = f"{100 * share:.0f}%"
            part = tag("rect", x=x, y=top + offset, width=max(size - 2, 0), height=28, style=colour(tone))
            marks.append(tag("g", tag("title", f"{item.name} {item.detail}: {name} {100 * share:.1f}%"), part))
            if size > CHARACTER * len(shown) + 4:
                kind = "on" if tone == "accent" else "paper" if tone == "second" else None
                marks.append(text(x + size / 2 - 1, top + offset + 19, shown, kind, "middle"))
            x += size
        marks.append(text(left + length + 10, top + offset + 19, item.label, "muted"))
    described = ("; ".join(f"{n} {100 * s:.1f}%" for n, s, _ in item.parts) for item in items)
    description = ". ".join(f"{item.name} {item.detail}: {parts}" for item, parts in zip(items, described, strict=True))
    return drawing(width, max(1, len(items)) * step, title, description, marks)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers that cover a range."""
    if high <= low:
        low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [place * step for place in range(first, last + 1)]


def decades(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... that cover a range of positive numbers."""
    found = [
        m * 10.0**p for p in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in (1, 2, 5)
    ]
    below = max(value for value in found if value <= low * (1 + 1e-9))
    above = min((value for value in found if value >= high * (1 - 1e-9)), default=found[-1])
    return [value for value in found if below <= value <= above]


def mark(place: int, x: float, y: float, size: float = 4) -> Html:
    """The mark of a series: its colour and its shape."""
    style = colour(f"s{place % COLOURS}")
    match place % 4:
        case 0:
            return tag("circle", cx=x, cy=y, r=size, style=style)
        case 1:
            return tag("rect", x=x - size, y=y - size, width=2 * size, height=2 * size, style=style)
        case 2:
            shape = [(x, y - 1.25 * size), (x + 1.15 * size, y + size), (x - 1.15 * size, y + size)]
        case _:
            shape = [(x, y - 1.35 * size), (x + 1.35 * size, y), (x, y + 1.35 * size), (x - 1.35 * size, y)]
    return tag("polygon", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in shape), style=style)


def legend(names: Sequence[str]) -> Html:
    """The marks of series and their names."""
    swatches = (
        tag("svg", _stroke(place, "M0,6 H26"), mark(place, 13, 6), viewBox="0 0 26 12", aria_hidden="true")
        for place in range(len(names))
    )
    return tag("ul", [tag("li", s, tag("span", n)) for s, n in zip(swatches, names, strict=True)], class_="legend")


def _stroke(place: int, path: str) -> Html:
    style = f"fill:none;stroke:var(--s{place % COLOURS})"
    return tag("path", d=path, style=style, stroke_width=2, stroke_dasharray=DASHES[place // COLOURS % len(DASHES)])


@dataclass(frozen=True, kw_only=True)
class Axes:
    """The axes of a plot."""

    x: str
    y: str
    y_shown: str | None = None
    """The text above the y axis, if not `y`."""
    format_y: Format = significant
    """Format of the values of marks."""
    format_x: Format = count
    tick_y: Format = tick
    """Format of the numbers at the axis."""
    tick_x: Format = tick
    y_range: Point | None = None
    """Ends of the y axis; the range of the values if not given."""
    log: bool = False
    whole_x: bool = True
    """Whether the x axis has whole numbers only."""


def lines(series: Sequence[Series], width: float, title: str, axes: Axes, *, names_at_end: bool = False) -> Html:
    """A plot of lines with marks.

    Args:
        series: At least one with a point.
        width: Pixels of the drawing's width.
        title: Name of the drawing.
        axes: The axes.
        names_at_end: Put names at the ends of the lines instead of a legend, and use one colour from pale to full, for
            series that have an order. Names that would cover another are left out.
    """
    points = [point for one in series for point in one.points]
    place_x, place_y, frame, height = _frame(points, width, axes, 76 if names_at_end else 14)
    marks, taken = [frame], list[float]()
    for place, one in enumerate(series):
        strength = 0.3 + 0.7 * (place + 1) / len(series) if names_at_end else 1
        shown = 0 if names_at_end else place
        path = "M" + " L".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in one.points)
        marks.append(tag("g", _stroke(shown, path) if one.points else [], opacity=strength))
        for x, y in one.points:
            where = f"{axes.x} {axes.format_x(x)}: {axes.format_y(y)}"
            name = tag("title", f"{one.name}, {where}" if one.name else where)
            marks.append(tag("g", name, mark(shown, place_x(x), place_y(y)), opacity=strength))
    for one in [*series[-1:], *series[:1], *reversed(series[1:-1])] if names_at_end else []:
        if not one.points:
            continue
        x, y = place_x(one.points[-1][0]), place_y(one.points[-1][1])
        if all(abs(y - other) >= 15 for other in taken):
            taken.append(y)
            marks.append(text(x + 12, y + 4, one.name))
    described = (", ".join(f"{axes.format_x(x)}: {axes.format_y(y)}" for x, y in one.points) for one in series)
    description = f"{axes.y} by {axes.x}. " + "; ".join(
        f"{one.name}: {values}" if one.name else values for one, values in zip(series, described, strict=True)
    )
    return drawing(width, height, title, description, marks)


def _frame(
    points: Sequence[Point], width: float, axes: Axes, right: float, *, height: float | None = None
) -> tuple[Callable[[float], float], Callable[[float], float], Html, float]:
    """Axes with ticks, the functions from values to positions, and the height."""
    low, high = axes.y_range or (min(y for _, y in points), max(y for _, y in points))
    y_ticks = decades(low, high) if axes.log else ticks(low, high)
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    if axes.whole_x:
        step = max(1, math.ceil((last - first + 1) / (24 if width > 500 else 9)))
        x_ticks = [float(x) for x in range(math.ceil(first), math.floor(last) + 1, step)]
        first, last = (first, last) if last > first else (first - 1, last + 1)
    else:
        x_ticks = ticks(first, last, 6 if width > 400 else 4)
        first, last = x_ticks[0], x_ticks[-1]
    left = 16 + CHARACTER * max(len(axes.tick_y(y)) for y in y_ticks)
    top, bottom = 30.0, (height or (340.0 if width > 500 else 270.0)) - 46

    def scaled(y: float) -> float:
        return math.log10(y) if axes.log else y

    def place_x(x: float) -> float:
        return left + 14 + (x - first) / (last - first) * (width - left - right - 28)

    def place_y(y: float) -> float:
        start, end = scaled(y_ticks[0]), scaled(y_ticks[-1])
        return bottom - (scaled(y) - start) / (end - start or 1) * (bottom - top)

    marks = [text(0, 13, axes.y if axes.y_shown is None else axes.y_shown, "muted")]
    for y in y_ticks:
        marks.append(line(left, place_y(y), width - right, place_y(y), "grid"))
        marks.append(text(left - 8, place_y(y) + 4, axes.tick_y(y), "muted", "end"))
    marks.append(line(left, bottom, width - right, bottom, "axis"))
    marks += [text(place_x(x), bottom + 19, axes.tick_x(x), "muted", "middle") for x in x_ticks]
    marks.append(text((left + width - right) / 2, bottom + 41, axes.x, "muted", "middle"))
    return place_x, place_y, tag("g", marks), bottom + 46


def scatter(points: Sequence[tuple[float, float, str]], width: float, title: str, axes: Axes) -> Html:
    """A plot of named points with the diagonal on which x and y are equal; both axes have the same range."""
    values = [value for x, y, _ in points for value in (x, y)]
    scale = ticks(min(values), max(values), 5)
    corners = [(scale[0], scale[0]), (scale[-1], scale[-1])]
    place_x, place_y, frame, height = _frame(corners, width, axes, 14, height=width)
    ends = [(place_x(x), place_y(y)) for x, y in corners]
    marks = [frame, line(*ends[0], *ends[1], "diagonal")]
    for x, y, name in points:
        words = f"{name}: {axes.x} {axes.format_x(x)}, {axes.y} {axes.format_y(y)}"
        dot = tag("circle", cx=place_x(x), cy=place_y(y), r=4.5, style=colour("accent"), fill_opacity=0.75)
        marks.append(tag("g", tag("title", words), dot))
    described = "; ".join(f"{name}: {axes.format_x(x)}, {axes.format_y(y)}" for x, y, name in points)
    return drawing(width, height, title, f"{axes.y} against {axes.x}. {described}", marks)
