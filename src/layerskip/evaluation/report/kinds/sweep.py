"""The report of `layerskip sweep`: the fastest exit layer and draft length, and how well they were predicted."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from layerskip.evaluation.report import numbers as show
from layerskip.evaluation.report.heatmap import Cell, heat_map
from layerskip.evaluation.report.numbers import number
from layerskip.evaluation.report.page import Html, Report, Row, figure, fold, section, table
from layerskip.evaluation.report.parts import mapping, objects, origin, subject
from layerskip.evaluation.report.plots import Axes, Series, legend, lines, scatter
from layerskip.evaluation.setting import Setting

METHODS = {
    "one_pass": "one pass over each text for all settings",
    "exhaustive": "decoding with each, and with the best once more",
}


def sweep_report(content: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Report:
    """The page of a sweep."""
    configuration, results = mapping(content.get("configuration")), mapping(content.get("results"))
    grid = grid_of(results)
    best = mapping(results.get("best"))
    baseline = number(results.get("autoregressive_tokens_per_second"))
    speedup, setting = number(best.get("speedup")), _setting(best)
    headline = "No setting was measured" if setting is None else _name(setting).capitalize()
    lead = []
    if setting is not None:
        lead.append(f"The fastest setting writes {show.significant(best.get('tokens_per_second'))} tokens per second")
        lead[0] += "." if speedup is None else f", {show.ratio(speedup)} as many as autoregressive decoding."
    lead.append(f"{len(grid):,} settings, found by {_method(results.get('method'))}.")
    about = subject(configuration)
    keys = [
        ("Tokens/s, best setting", show.significant(best.get("tokens_per_second"))),
        ("Tokens/s, autoregressive", show.significant(baseline)),
        ("Speedup", show.ratio(speedup)),
        ("Prediction error", show.percent(results.get("prediction_error"))),
    ]
    return Report(
        title=f"{headline} – layerskip sweep",
        kind=" · ".join(filter(None, ("layerskip sweep", about))),
        headline=headline,
        lead=lead,
        keys=[(name, value) for name, value in keys if value != show.NONE],
        sections=[
            _map(grid, setting, baseline),
            _prediction(grid, number(results.get("prediction_error"))),
            _acceptance(grid),
            _all(grid, setting),
            *origin(content),
        ],
    )


def _method(value: Any) -> str:
    return METHODS.get(str(value), show.plain(value))


def _name(setting: Setting) -> str:
    return f"exit {setting.exit_layer}, {_drafts(setting.num_speculations)}"


def _drafts(length: int) -> str:
    return f"{length} draft" + "s" * (length != 1)


def _setting(entry: Mapping[str, Any]) -> Setting | None:
    layer, length = number(entry.get("exit_layer")), number(entry.get("num_speculations"))
    return None if layer is None or length is None else Setting(int(layer), int(length))


def grid_of(results: Mapping[str, Any]) -> dict[Setting, dict[str, Any]]:
    """The settings of a sweep, in order."""
    entries = ((_setting(entry), entry) for entry in objects(results.get("grid")))
    found = {setting: entry for setting, entry in entries if setting is not None}
    return {setting: found[setting] for setting in sorted(found)}


def speed_of(entry: Mapping[str, Any]) -> tuple[float | None, bool]:
    """Tokens per second, and whether they were measured or only predicted."""
    measured = number(entry.get("tokens_per_second"))
    return (measured, True) if measured is not None else (number(entry.get("predicted_tokens_per_second")), False)


def _map(grid: Mapping[Setting, Mapping[str, Any]], best: Setting | None, baseline: float | None) -> Html | None:
    cells: dict[tuple[int, int], Cell] = {}
    predictions = 0
    for setting, entry in grid.items():
        speed, measured = speed_of(entry)
        if speed is None:
            continue
        predictions += not measured
        shown = ("" if measured else "≈") + show.significant(speed)
        words = f"{_name(setting)}: {shown} tokens/s"
        if baseline:
            words += f", {show.ratio(speed / baseline)} autoregressive"
        words += f", {show.percent(entry.get('acceptance_rate'))} accepted"
        cells[setting] = Cell(value=speed, shown=shown, title=words)
    if not cells:
        return None
    values = [cell.value for cell in cells.values()]
    ends = show.significant(min(values)), show.significant(max(values))

    def draw(width: float) -> Html:
        return heat_map(
            cells, width, "Tokens per second by setting", rows="exit layer", columns="drafts", best=best, ends=ends
        )

    caption = "The framed setting is the best of those that were measured." if best in cells else ""
    if predictions:
        caption += " ≈: predicted, not measured."
    note = "Tokens per second for each exit layer and draft length."
    if baseline:
        slower = sum(value < baseline for value in values)
        note += f" Autoregressive: {show.significant(baseline)}; {slower:,} of {len(values):,} settings are slower."
    return section("The grid", note, figure(draw, caption.strip()))


def prediction_errors(grid: Mapping[Setting, Mapping[str, Any]]) -> dict[Setting, float]:
    """|predicted / measured - 1| of all settings with both speeds."""
    errors = {}
    for setting, entry in grid.items():
        predicted, measured = number(entry.get("predicted_tokens_per_second")), number(entry.get("tokens_per_second"))
        if predicted is not None and measured:
            errors[setting] = abs(predicted / measured - 1)
    return errors


def _prediction(grid: Mapping[Setting, Mapping[str, Any]], error: float | None) -> Html | None:
    errors = prediction_errors(grid)
    if not errors:
        return None
    points = [
        (
            float(grid[setting]["predicted_tokens_per_second"]),
            float(grid[setting]["tokens_per_second"]),
            _name(setting),
        )
        for setting in errors
    ]
    axes = Axes(x="predicted tokens/s", y="measured tokens/s", format_x=show.significant, whole_x=False)
    worst = max(errors, key=lambda setting: errors[setting])
    note = (
        f"{len(errors):,} settings have both. The prediction is off by {show.percent(median(errors.values()))} in the "
        f"median, and by {show.percent(errors[worst])} at most ({_name(worst)})."
    )
    if error is not None:
        note += f" The run's own figure for the error: {show.percent(error)}."
    caption = "On the dashed line both are equal."
    drawn = figure(lambda width: scatter(points, width, "Predicted against measured", axes), caption, square=True)
    return section("Predicted and measured", note, drawn)


def _acceptance(grid: Mapping[Setting, Mapping[str, Any]]) -> Html | None:
    rates = {setting: rate for setting, e in grid.items() if (rate := number(e.get("acceptance_rate"))) is not None}
    if not rates:
        return None
    lengths, exits = sorted({k for _, k in rates}), sorted({e for e, _ in rates})
    by_exit = len(lengths) == 1  # curves of a single point show nothing
    if by_exit:
        points = [(float(layer), rates[Setting(layer, lengths[0])]) for layer in exits]
        series = [Series(name=_drafts(lengths[0]), points=points)]
    else:
        series = [
            Series(
                name=f"exit {layer}", points=[(float(k), rate) for (e, k), rate in sorted(rates.items()) if e == layer]
            )
            for layer in exits
        ]
    axes = Axes(
        x="exit layer" if by_exit else "drafts a round",
        y="drafts accepted",
        format_y=show.percent,
        tick_y=show.percent_tick,
        y_range=(0, 1),
    )
    drawn = figure(
        lambda width: lines(series, width, "Acceptance by exit", axes, names_at_end=not by_exit),
        legend=legend([series[0].name]) if by_exit else None,
    )
    note = "The share of drafts that became part of the text."
    return section(
        "Acceptance by exit", note if by_exit else f"{note} The fuller the colour, the later the exit.", drawn
    )


def _all(grid: Mapping[Setting, Mapping[str, Any]], best: Setting | None) -> Html | None:
    if not grid:
        return None
    names = ("acceptance_rate", "tokens_per_second", "predicted_tokens_per_second", "time_per_token", "total_time")
    formats = (show.percent, show.significant, show.significant, show.seconds, show.seconds)
    rows = [
        Row(
            head=_name(setting),
            cells=[form(entry.get(name)) for name, form in zip(names, formats, strict=True)],
            best=setting == best,
        )
        for setting, entry in grid.items()
    ]
    columns = ("setting", "accepted", "tokens/s", "predicted", "each token", "in all")
    body = table(columns, rows)
    return section(
        "All settings", "As in results.json.", fold(f"{len(rows):,} settings", body, is_open=len(rows) <= 12)
    )
