"""The report of `layerskip eval`: quality by exit layer."""

from collections.abc import Mapping, Sequence
from typing import Any

from layerskip.evaluation.report import numbers as show
from layerskip.evaluation.report.numbers import number
from layerskip.evaluation.report.page import Content, Html, Report, Row, figure, section, small, table, titled
from layerskip.evaluation.report.parts import mapping, objects, origin, subject
from layerskip.evaluation.report.plots import Axes, Series, legend, lines

Scores = dict[tuple[str, str], dict[int, Any]]
"""Values by task and metric, and then by exit layer."""
MOST_COLUMNS = 6
"""Exits that a table has as columns, at most; with more exits they are rows."""
SHARED_PASS = "Log-likelihoods of all exits take one pass, and each exit has its share of the time."


def eval_report(content: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Report:
    """The page of an evaluation."""
    configuration, results = mapping(content.get("configuration")), mapping(content.get("results"))
    exits, scores = exits_of(results), scores_of(results)
    tasks = list(dict.fromkeys(task for task, _ in scores))
    headline = f"Quality at {len(exits)} exits" if len(exits) != 1 else f"Quality at exit {exits[0]}"
    about = subject(configuration)
    lead = f"{show.plain(tasks)}: how good the model is when it stops after its first layers." if tasks else "No task."
    return Report(
        title=f"{headline} – layerskip eval",
        kind=" · ".join(filter(None, ("layerskip eval", about))),
        headline=headline,
        lead=[lead],
        keys=_keys(exits, scores),
        sections=[_quality(exits, scores), _speed(results), *origin(content)],
    )


def exits_of(results: Mapping[str, Any]) -> list[int]:
    """Exit layers that were evaluated."""
    return sorted({layer for layer, _ in _entries(results)})


def _entries(results: Mapping[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    found = ((number(entry.get("exit_layer")), entry) for entry in objects(results.get("exits")))
    return [(int(layer), entry) for layer, entry in found if layer is not None]


def scores_of(results: Mapping[str, Any]) -> Scores:
    """All values of the evaluation, standard errors included."""
    scores: Scores = {}
    for layer, entry in _entries(results):
        for task, metrics in mapping(entry.get("tasks")).items():
            for metric, value in mapping(metrics).items():
                scores.setdefault((task, metric), {})[layer] = value
    return scores


def speeds_of(results: Mapping[str, Any]) -> dict[str, dict[int, Any]]:
    """Speeds by name and exit layer."""
    speeds: dict[str, dict[int, Any]] = {}
    for layer, entry in _entries(results):
        for name, value in mapping(entry.get("speed")).items():
            speeds.setdefault(name, {})[layer] = value
    return speeds


def metric_name(metric: str) -> str:
    """A metric's name without lm-evaluation-harness's suffix for the filter that does nothing."""
    return metric.removesuffix(",none")


def is_error(metric: str) -> bool:
    """Whether a metric is the standard error of another."""
    return "_stderr" in metric


def _keys(exits: Sequence[int], scores: Scores) -> list[tuple[str, str]]:
    found = [("Exits", show.plain(exits) if len(exits) <= 4 else f"{exits[0]} to {exits[-1]}")] if exits else []
    for (task, metric), values in scores.items():
        if exits and not is_error(metric) and number(values.get(exits[-1])) is not None and len(found) < 4:
            value = show.significant(values[exits[-1]], 4)
            found.append((f"{task}, {metric_name(metric)}, exit {exits[-1]}", value))
    return found


def _quality(exits: Sequence[int], scores: Scores) -> Html | None:
    plain = {key: values for key, values in scores.items() if not is_error(key[1]) and _points(values)}
    if not plain:
        return None
    plots = [_plot(metric, plain) for metric in dict.fromkeys(metric for _, metric in plain)]
    cells = {
        f"{task}, {metric_name(metric)}": [
            _cell(values.get(layer), _error(scores, task, metric, layer)) for layer in exits
        ]
        for (task, metric), values in plain.items()
    }
    body = _table("task and metric", exits, cells)
    note = "A plot for each metric, a line for each task; ± is a standard error."
    return section("Quality by exit layer", note, *plots, body)


def stand_across(exits: Sequence[object], figures: Mapping[str, object]) -> bool:
    """Whether a table has exits as columns and not as rows."""
    return len(exits) <= max(MOST_COLUMNS, len(figures))


def _table(what: str, exits: Sequence[int], figures: Mapping[str, Sequence[Content]]) -> Html:
    """Figures by exit, with exits as columns if there are few, else as rows."""
    names = [f"exit {layer}" for layer in exits]
    if stand_across(exits, figures):
        return table([what, *names], [Row(head=name, cells=list(cells)) for name, cells in figures.items()])
    down = zip(*figures.values(), strict=True)
    return table(["", *figures], [Row(head=name, cells=list(cells)) for name, cells in zip(names, down, strict=True)])


def _error(scores: Scores, task: str, metric: str, layer: int) -> Any:
    """The standard error of a metric: `acc,none` has `acc_stderr,none`."""
    name, comma, rest = metric.partition(",")
    return scores.get((task, f"{name}_stderr{comma}{rest}"), {}).get(layer)


def _cell(value: Any, error: Any) -> Content:
    if number(value) is None:
        return show.NONE if value is None or isinstance(value, float) else show.plain(value)
    deviation = None if number(error) is None else small(f"± {show.significant(error, 2)}")
    return [show.significant(value, 4), deviation]


def _points(values: Mapping[int, Any]) -> list[tuple[float, float]]:
    return [(float(layer), found) for layer, value in sorted(values.items()) if (found := number(value)) is not None]


def _plot(metric: str, scores: Scores) -> Html | None:
    series = [Series(name=task, points=_points(values)) for (task, name), values in scores.items() if name == metric]
    return by_exit(series, metric_name(metric))


def by_exit(series: Sequence[Series], name: str) -> Html | None:
    """A plot of values by exit layer; None without points."""
    drawn = [one for one in series if one.points]
    values = [y for one in drawn for _, y in one.points]
    if not values:
        return None
    log = min(values) > 0 and max(values) > 10 and max(values) > 20 * min(values)  # perplexities of the first exits
    bounded = not log and min(values) >= 0 and max(values) <= 1
    axes = Axes(
        x="exit layer", y=name, y_shown="logarithmic" if log else "", log=log, y_range=(0, 1) if bounded else None
    )
    names = legend([one.name for one in drawn]) if any(one.name for one in drawn) else None
    return titled(name, figure(lambda width: lines(drawn, width, f"{name} by exit layer", axes), legend=names))


def _speed(results: Mapping[str, Any]) -> Html | None:
    speeds = speeds_of(results)
    if not speeds:
        return None
    exits = exits_of(results)
    points = _points(speeds.get("tokens_per_second", {}))
    plot = by_exit([Series(name="", points=points)], "tokens per second")
    cells: dict[str, list[Content]] = {
        name.replace("_", " "): [_figure(name, values.get(layer)) for layer in exits] for name, values in speeds.items()
    }
    note = "Of the same runs."
    if len(exits) > 1 and "tokens_scored" in speeds:
        note += f" {SHARED_PASS}"
    return section("Speed by exit layer", note, plot, _table("", exits, cells))


def _figure(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        return show.memory(value)
    return show.seconds(value) if name.endswith(("seconds", "_s")) else show.significant(value)
