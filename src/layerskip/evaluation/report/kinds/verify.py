"""The report of `layerskip verify`: errors and near-ties of speculative decoding."""

from collections.abc import Mapping, Sequence
from typing import Any

from layerskip.evaluation.report import numbers as show
from layerskip.evaluation.report.numbers import number
from layerskip.evaluation.report.page import Content, Html, Report, Row, section, table, tag
from layerskip.evaluation.report.parts import mapping, objects, origin, subject

ROWS_SHOWN = 200
COUNTS = ("prompts", "tokens", "differences", "near_ties", "errors")


def verify_report(content: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Report:
    """The page of a verification."""
    configuration, results = mapping(content.get("configuration")), mapping(content.get("results"))
    errors, ties = number(results.get("errors")), number(results.get("near_ties"))
    settings = objects(results.get("settings"))
    if errors is None:
        headline, lead = "No verdict", "The run doesn't say how many errors it found."
    elif errors:
        headline = f"{show.count(errors)} {'error' if errors == 1 else 'errors'}"
        lead = "Some texts differ from those of autoregressive decoding, and rounding doesn't explain it."
    elif ties:
        headline = "Nothing lost"
        what = "difference is a near-tie" if ties == 1 else "differences are all near-ties"
        lead = f"The {show.count(ties)} {what}: two tokens of nearly the same score, which rounding swaps."
    else:
        headline = "Nothing lost"
        lead = "Self-speculative decoding wrote the tokens of autoregressive decoding, every one of them."
    about = subject(configuration)
    return Report(
        title=f"{headline} – layerskip verify",
        kind=" · ".join(filter(None, ("layerskip verify", about))),
        headline=headline,
        lead=[lead],
        keys=[
            (name.replace("_", "-").capitalize(), show.count(results[name]))
            for name in COUNTS
            if number(results.get(name)) is not None
        ],
        sections=[_settings(settings), _differences(settings, samples), *origin(content)],
    )


def _settings(settings: Sequence[Mapping[str, Any]]) -> Html | None:
    if not settings:
        return None
    rows = [
        Row(
            head=str(s.get("mode", "–")),
            cells=[
                show.count(s.get("exit_layer")),
                show.count(s.get("num_speculations")),
                show.count(s.get("equal")),
                show.count(s.get("near_ties")),
                _errors(s.get("errors")),
                show.count(s.get("tokens")),
                _acceptance(s),
            ],
        )
        for s in settings
    ]
    columns = ("mode", "exit", "drafts", "equal", "near-ties", "errors", "tokens", "accepted")
    return section("Settings", "Prompts by the outcome of the comparison.", table(columns, rows))


def _errors(value: Any) -> Content:
    return tag("span", show.count(value), class_="bad") if number(value) else show.count(value)


def _acceptance(setting: Mapping[str, Any]) -> str:
    drafted, accepted = number(setting.get("drafted")), number(setting.get("accepted"))
    return show.percent(accepted / drafted) if drafted and accepted is not None else show.NONE


def differences_of(
    settings: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """First differences, each with its setting, taken from the settings, or else from the samples."""
    found = [(s, d) for s in settings for d in objects(s.get("divergences"))]
    if not found:
        found = [(s, s["divergence"]) for s in samples if isinstance(s.get("divergence"), dict)]
    return sorted(found, key=lambda pair: bool(pair[1].get("near_tie", True)))


def _differences(settings: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]) -> Html:
    found = differences_of(settings, samples)
    rows = [
        Row(
            head=_kind(d),
            cells=[
                str(s.get("mode", "–")),
                show.count(s.get("exit_layer")),
                show.count(s.get("num_speculations")),
                show.count(d.get("prompt")),
                show.count(d.get("position")),
                _token(d.get("expected")),
                _token(d.get("actual")),
                show.significant(d.get("gap")),
            ],
        )
        for s, d in found[:ROWS_SHOWN]
    ]
    columns = ("", "mode", "exit", "drafts", "prompt", "token no.", "expected", "written", "gap in logits")
    note = (
        "The first token at which two texts of a prompt differ. In a near-tie either token wins if logits move by no "
        "more than the tolerance."
    )
    if len(found) > ROWS_SHOWN:
        note += f" The first {ROWS_SHOWN} of {len(found):,}."
    return section(
        "Differences", note, table(columns, rows, words=(1,)) if rows else tag("p", "The run lists no differences.")
    )


def _kind(difference: Mapping[str, Any]) -> Content:
    return "near-tie" if difference.get("near_tie", True) else tag("span", "error", class_="bad")


def _token(value: Any) -> str:
    """A token's id; "end of the text" if there is none."""
    return "end" if value is None else str(value)
