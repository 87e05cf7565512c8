"""Pages of reports: markup that escapes its content, and the few elements that reports use."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from layerskip.evaluation.report.style import STYLE
from layerskip.machine import __version__

WIDE, NARROW = 812, 350
"""Pixels of the two widths that plots are drawn for: beside a heading, and on a phone."""
NOT_HTML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""Characters that HTML doesn't allow."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Content security policy: a page loads and runs nothing, whatever its texts contain."""


class Html(str):
    """Text that is markup already; all other text is escaped when it becomes part of a page."""

    __slots__ = ()


Content = str | Iterable["str | None"] | None
"""A text, markup, or several of them; None is left out."""


def markup(content: Content) -> Html:
    """Markup of some content: unchanged if it is markup, otherwise escaped."""
    if content is None:
        return Html()
    if isinstance(content, Html):
        return content
    if isinstance(content, str):
        return Html(escape(NOT_HTML.sub("\ufffd", content)))
    return Html("".join(markup(part) for part in content))


def tag(name: str, *content: Content, **attributes: str | float | None) -> Html:
    """An element.

    Args:
        name: Name of the element.
        *content: Content of the element; texts are escaped.
        **attributes: Attributes; `class_` is class, `stroke_width` is stroke-width, None is left out, numbers are
          rounded.
    """
    pairs = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None)
    opening = "".join(f' {key}="{markup(_attribute(value))}"' for key, value in pairs)
    return Html(f"<{name}{opening}>{markup(list(map(markup, content)))}</{name}>")


def _attribute(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


@dataclass(frozen=True, kw_only=True)
class Report:
    """Content of a page."""

    title: str
    """The page's title in the browser."""
    kind: str
    """The line above the headline."""
    headline: str
    lead: Sequence[str]
    """Paragraphs below the headline."""
    keys: Sequence[tuple[str, str]] = ()
    """Names and values of the most important figures."""
    sections: Sequence[Html | None] = ()


def page(report: Report) -> str:
    """The HTML of a whole page."""
    keys = [tag("div", tag("dt", name), tag("dd", value)) for name, value in report.keys]
    header = tag(
        "header",
        tag("p", report.kind, class_="kind"),
        tag("h1", report.headline),
        [tag("p", text, class_="lead") for text in report.lead],
        tag("dl", keys, class_="keys") if keys else None,
    )
    body = tag("main", header, report.sections, tag("footer", f"layerskip {__version__}"), class_="page")
    head = tag(
        "head",
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", report.title),
        tag("style", Html(STYLE)),
    )
    return "<!DOCTYPE html>\n" + tag("html", "\n", head, "\n", tag("body", body), "\n", lang="en") + "\n"


def section(title: str, note: Content, *content: Content) -> Html:
    """A section of the page: a heading with a remark beside it."""
    remark = tag("p", note, class_="note") if note else None
    return tag("section", tag("header", tag("h2", title), remark), tag("div", *content, class_="body"))


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table."""

    head: Content
    cells: Sequence[Content]
    best: bool = False


def table(columns: Sequence[str], rows: Sequence[Row], *, words: Sequence[int] = ()) -> Html:
    """A table that scrolls in its own box if it is too wide.

    Args:
        columns: Names of the columns, the column of row heads first.
        rows: Rows of the table.
        words: Indices of columns with words instead of figures; column 0, the row heads, always counts as words.
    """
    left = {0, *words}

    def kind(place: int) -> str | None:
        return "words" if place in left else None

    head = [tag("th", name, class_=kind(place), scope="col") for place, name in enumerate(columns)]
    lines = [
        tag(
            "tr",
            tag("th", row.head, class_="words", scope="row"),
            [tag("td", cell, class_=kind(place)) for place, cell in enumerate(row.cells, start=1)],
            class_="best" if row.best else None,
        )
        for row in rows
    ]
    return scroll(tag("table", tag("thead", tag("tr", head)), tag("tbody", lines)))


def scroll(content: Html) -> Html:
    """A box that scrolls sideways, by touch or with the keyboard."""
    return tag("div", content, class_="scroll", tabindex="0")


def pairs(items: Iterable[tuple[str, str]]) -> Html:
    """Names and values in a list."""
    lines = [tag("tr", tag("th", name, class_="words", scope="row"), tag("td", value)) for name, value in items]
    return tag("table", tag("tbody", lines), class_="pairs")


def figure(
    draw: Callable[[float], Html], caption: Content = None, *, legend: Html | None = None, square: bool = False
) -> Html:
    """A plot, drawn once for a wide and once for a narrow page, so that its text is readable on both.

    Args:
        draw: Draws the plot for a width in pixels.
        caption: A remark below the plot.
        legend: The legend above the plot.
        square: The plot is as high as wide, and doesn't take the whole width.
    """
    width = 540 if square else WIDE
    return tag(
        "figure",
        legend,
        tag("div", draw(width), class_="wide scroll", tabindex="0"),
        tag("div", draw(NARROW), class_="narrow scroll", tabindex="0"),
        tag("figcaption", caption) if caption else None,
        class_="plot square" if square else "plot",
    )


def titled(title: str, *content: Content) -> Html:
    """A subsection: a heading and its content."""
    return tag("div", tag("h3", title), *content)


def fold(summary: Content, *content: Content, is_open: bool = False) -> Html:
    """A part that opens with a click."""
    return tag("details", tag("summary", summary), tag("div", *content), open="" if is_open else None)


def small(text: str) -> Html:
    """A second line in a table's cell."""
    return tag("small", text)
