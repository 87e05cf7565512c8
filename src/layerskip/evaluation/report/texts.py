"""Texts of a run, with accepted drafts and corrections marked by colour and line."""

from collections.abc import Mapping, Sequence
from typing import Any

from layerskip.evaluation.report import numbers as show
from layerskip.evaluation.report.page import Html, fold, section, tag
from layerskip.evaluation.report.parts import mapping

PROMPTS_SHOWN = 5
TEXT_SHOWN = 3000
"""Characters of a text that are shown."""
SOURCES = {
    "accepted": "a draft that was accepted",
    "corrected": "the model's own token in place of a draft",
    "bonus": "the model's own token after the last draft",
}
"""Sources of a piece of text that have a style; other pieces are plain."""


def texts_section(samples: Sequence[Mapping[str, Any]], order: Sequence[str]) -> Html | None:
    """The first prompts with the text of each strategy.

    Args:
        samples: Samples of the run, in the order in which they were finished.
        order: Names of strategies.
    """
    places = {name: place for place, name in enumerate(order)}
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        if isinstance(sample.get("text"), str):
            groups.setdefault(str(sample.get("index", sample.get("key"))), []).append(sample)
    if not groups:
        return None
    for group in groups.values():
        group.sort(key=lambda sample: places.get(str(sample.get("strategy")), len(places)))
    shown = list(groups.items())[:PROMPTS_SHOWN]
    marked = any(sample.get("pieces") for _, group in shown for sample in group)
    left = f"{len(shown)} of {len(groups):,} prompts; all are in samples.jsonl."
    parts = [_prompt(name, group, is_open=not place) for place, (name, group) in enumerate(shown)]
    return section("Texts", left, _legend() if marked else None, *parts)


def _legend() -> Html:
    entries = [
        tag("li", tag("span", tag("span", kind, class_=kind), class_="pieces"), tag("span", meaning))
        for kind, meaning in SOURCES.items()
    ]
    return tag("ul", entries, class_="legend")


def _prompt(name: str, group: Sequence[Mapping[str, Any]], *, is_open: bool) -> Html:
    prompt, reference = group[0].get("prompt"), group[0].get("reference")
    summary = [f"Prompt {name}: ", tag("code", show.shorten(str(prompt or ""), 70))]
    parts = [_text("Prompt", "", [_cut(str(prompt))]) if prompt else None]
    parts.append(_text("Reference", "", [_cut(str(reference))]) if reference else None)
    seen: dict[str, str] = {}
    for sample in group:
        strategy = show.strategy_name(sample.get("strategy", "text"))
        parts.append(_sample(strategy, sample, seen))
        seen.setdefault(str(sample["text"]), strategy)
    return fold(summary, parts, is_open=is_open)


def _sample(strategy: str, sample: Mapping[str, Any], seen: Mapping[str, str]) -> Html:
    text, pieces = str(sample["text"]), _pieces(sample.get("pieces"))
    figures = ", ".join(filter(None, (_speed(sample), _metrics(sample))))
    same = seen.get(text)
    if same is not None and not any(kind in SOURCES for _, kind in pieces):
        return tag(
            "div",
            tag("h3", strategy, tag("small", figures)),
            tag("p", f"The text of {same}.", class_="note"),
            class_="text",
        )
    remark = f"the text of {same}" if same is not None else ""
    return _text(strategy, ", ".join(filter(None, (figures, remark))), _marked(pieces) if pieces else [_cut(text)])


def _pieces(value: Any) -> list[tuple[str, str]]:
    pieces = value if isinstance(value, list) else []
    return [(str(piece[0]), str(piece[1])) for piece in pieces if isinstance(piece, list) and len(piece) == 2]


def _marked(pieces: Sequence[tuple[str, str]]) -> list[str]:
    """Pieces in their styles, up to the length that is shown."""
    shown: list[str] = []
    room = TEXT_SHOWN
    for text, kind in pieces:
        if room <= 0:
            break
        part = text[:room]
        room -= len(part)
        shown.append(tag("span", part, class_=kind) if kind in SOURCES else part)
    left = sum(len(text) for text, _ in pieces) - TEXT_SHOWN
    return [*shown, _more(left)] if left > 0 else shown


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_SHOWN else f"{text[:TEXT_SHOWN]}{_more(len(text) - TEXT_SHOWN)}"


def _more(left: int) -> str:
    return f"… ({left:,} more characters in samples.jsonl)"


def _text(title: str, figures: str, content: Sequence[str]) -> Html:
    heading = tag("h3", title, tag("small", figures) if figures else None)
    return tag("div", heading, tag("pre", "\n", content, class_="pieces", dir="auto"), class_="text")


def _speed(sample: Mapping[str, Any]) -> str:
    speed = show.number(mapping(sample.get("stats")).get("tokens_per_second"))
    return "" if speed is None else f"{show.significant(speed)} tokens/s"


def _metrics(sample: Mapping[str, Any]) -> str:
    found = mapping(sample.get("metrics")).items()
    return ", ".join(f"{name} {show.significant(value, 4)}" for name, value in found if show.number(value) is not None)
