"""Runs of one kind side by side: settings that differ, and the ratios of their figures to the first run's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerskip.evaluation.report import numbers as show
from layerskip.evaluation.report.kinds.benchmark import full_name, has_drafts
from layerskip.evaluation.report.kinds.eval import exits_of, is_error, metric_name, scores_of, speeds_of
from layerskip.evaluation.report.kinds.load import TIMES
from layerskip.evaluation.report.kinds.sweep import grid_of, speed_of
from layerskip.evaluation.report.kinds.verify import COUNTS
from layerskip.evaluation.report.numbers import flatten, number
from layerskip.evaluation.report.page import Content, Html, Report, Row, figure, fold, section, small, table, tag
from layerskip.evaluation.report.parts import mapping, objects
from layerskip.evaluation.report.plots import COLOURS, Bar, bars, legend

ROWS_OPEN = 24
"""Rows of a table that isn't folded, at most."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One of the compared runs."""

    label: str
    content: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A figure of several runs."""

    value: float
    is_speed: bool = False
    """Whether the figure is in tokens per second and gets a bar."""
    shown: Callable[[Any], str] = show.significant


def compare_page(runs: Sequence[Run]) -> Report:
    """The page of a comparison."""
    kind = str(runs[0].content.get("kind"))
    measures = [MEASURES[kind](mapping(run.content.get("results"))) for run in runs]
    names = list(dict.fromkeys(name for found in measures for name in found))
    shared = sum(all(name in found for found in measures) for name in names)
    headline = f"{len(runs)} runs of layerskip {kind}"
    return Report(
        title=headline,
        kind="layerskip report",
        headline=headline,
        lead=[f"Side by side: {shared:,} of {len(names):,} figures are in all runs. Ratios are to {runs[0].label}."],
        sections=[
            _runs(runs),
            _configurations(runs, "configuration", "Configuration", "What was set differently."),
            _configurations(runs, "machine", "Machine", "Where the machines or versions differ."),
            _speeds(runs, measures, names),
            _ratios(runs, measures, names),
        ],
    )


def benchmark_measures(results: Mapping[str, Any]) -> dict[str, Measure]:
    """Speed, acceptance and metrics of every strategy."""
    found: dict[str, Measure] = {}
    strategies = objects(results.get("strategies"))
    for strategy in strategies:
        name = full_name(strategy)
        _add(found, f"{name}: tokens/s", strategy.get("tokens_per_second"), is_speed=True)
    for strategy in strategies:
        name = full_name(strategy)
        _add(found, f"{name}: speedup", strategy.get("speedup"), shown=show.ratio)
        first, each = mapping(strategy.get("time_to_first_token_s")), mapping(strategy.get("time_per_token_s"))
        _add(found, f"{name}: first token", first.get("median"), shown=show.seconds)
        _add(found, f"{name}: each token", each.get("median"), shown=show.seconds)
        if has_drafts(strategy):
            _add(found, f"{name}: accepted", strategy.get("acceptance_rate"), shown=show.percent)
        _add(found, f"{name}: peak memory", strategy.get("peak_memory_bytes"), shown=show.memory)
        for metric, value in mapping(strategy.get("metrics")).items():
            _add(found, f"{name}: {metric}", value, shown=_fine)
    return found


def sweep_measures(results: Mapping[str, Any]) -> dict[str, Measure]:
    """Speed without drafts, with the best setting, and with all settings."""
    found: dict[str, Measure] = {}
    _add(found, "autoregressive: tokens/s", results.get("autoregressive_tokens_per_second"), is_speed=True)
    best = mapping(results.get("best"))
    _add(found, "best setting: tokens/s", best.get("tokens_per_second"), is_speed=True)
    _add(found, "best setting: speedup", best.get("speedup"), shown=show.ratio)
    for (layer, length), entry in grid_of(results).items():
        _add(found, f"exit {layer}, drafts {length}: tokens/s", speed_of(entry)[0])
    return found


def eval_measures(results: Mapping[str, Any]) -> dict[str, Measure]:
    """Speed and all metrics at every exit."""
    found: dict[str, Measure] = {}
    speeds = speeds_of(results).get("tokens_per_second", {})
    for layer in exits_of(results):
        _add(found, f"exit {layer}: tokens/s", speeds.get(layer), is_speed=True)
    for (task, metric), values in scores_of(results).items():
        if not is_error(metric):
            for layer, value in sorted(values.items()):
                _add(found, f"{task}, {metric_name(metric)}, exit {layer}", value, shown=_fine)
    return found


def verify_measures(results: Mapping[str, Any]) -> dict[str, Measure]:
    """Counts of comparisons by outcome."""
    found: dict[str, Measure] = {}
    for name in COUNTS:
        _add(found, name.replace("_", "-"), results.get(name), shown=show.count)
    return found


def load_measures(results: Mapping[str, Any]) -> dict[str, Measure]:
    """Throughput, latencies and acceptance."""
    found: dict[str, Measure] = {}
    _add(found, "output: tokens/s", results.get("output_tokens_per_second"), is_speed=True)
    _add(found, "requests/s", results.get("requests_per_second"))
    for name, title in TIMES.items():
        for column in ("mean", "p50", "p95", "p99"):
            _add(found, f"{title}, {column}", mapping(results.get(name)).get(column), shown=show.seconds)
    rate = mapping(results.get("speculation")).get("draft_acceptance_rate")
    _add(found, "drafts accepted", rate, shown=show.percent)
    return found


MEASURES: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Measure]]] = {
    "benchmark": benchmark_measures,
    "sweep": sweep_measures,
    "eval": eval_measures,
    "verify": verify_measures,
    "bench-serve": load_measures,
}
"""Functions for the figures of each kind of run."""


def _add(
    found: dict[str, Measure],
    name: str,
    value: Any,
    *,
    is_speed: bool = False,
    shown: Callable[[Any], str] = show.significant,
) -> None:
    known = number(value)
    if known is not None:
        found[name] = Measure(value=known, is_speed=is_speed, shown=shown)


def _fine(value: Any) -> str:
    return show.significant(value, 4)


def _runs(runs: Sequence[Run]) -> Html:
    rows = []
    for run in runs:
        machine = mapping(run.content.get("machine"))
        processor = machine.get("gpu") or machine.get("cpu")
        figures = [show.plain(machine.get("date")), show.plain(machine.get("commit")), show.plain(processor)]
        rows.append(Row(head=run.label, cells=figures))
    return section("Runs", None, table(("run", "date", "commit", "processor"), rows, words=(1, 2, 3)))


def differences(runs: Sequence[Run], part: str) -> dict[str, list[str]]:
    """Names of settings that differ between runs, with the value of each run."""
    settings = [flatten(mapping(run.content.get(part))) for run in runs]
    names = dict.fromkeys(name for one in settings for name in one if (part, name) != ("machine", "date"))
    shown = {name: [show.plain(one[name]) if name in one else show.NONE for one in settings] for name in names}
    return {name: values for name, values in shown.items() if len(set(values)) > 1}


def _configurations(runs: Sequence[Run], part: str, title: str, note: str) -> Html:
    rows = [Row(head=name, cells=values) for name, values in differences(runs, part).items()]
    if not rows:
        return section(title, note, tag("p", "The same in all runs."))
    labels = [run.label for run in runs]
    return section(title, note, table(["", *labels], rows, words=range(1, len(labels) + 1)))


def _speeds(runs: Sequence[Run], measures: Sequence[Mapping[str, Measure]], names: Sequence[str]) -> Html | None:
    items = []
    for name in names:
        if not any(name in found and found[name].is_speed for found in measures):
            continue
        first = measures[0].get(name)
        for place, (run, found) in enumerate(zip(runs, measures, strict=True)):
            value = found[name].value if name in found else None
            label = show.significant(value)
            if place and value is not None and first is not None and first.value:
                label += f" ({show.ratio(value / first.value)})"
            short, tone = name.removesuffix(": tokens/s"), f"s{place % COLOURS}"
            items.append(Bar(name=short, detail=run.label, value=value, label=label, tone=tone))
    if not items:
        return None
    labels = legend([run.label for run in runs])
    return section(
        "Speed",
        f"Tokens per second, and in brackets how many times {runs[0].label} that is.",
        figure(lambda width: bars(items, width, "Tokens per second by run"), legend=labels),
    )


def _ratios(runs: Sequence[Run], measures: Sequence[Mapping[str, Measure]], names: Sequence[str]) -> Html:
    rows = [
        Row(head=name, cells=[_cell(found.get(name), measures[0].get(name)) for found in measures]) for name in names
    ]
    body = table(["", *(run.label for run in runs)], rows)
    note = f"Below each figure: how many times {runs[0].label} it is."
    if len(rows) > ROWS_OPEN:
        body = fold(f"{len(rows):,} figures", body, is_open=True)
    return section("All figures", note, body if rows else tag("p", "No run has any."))


def _cell(measure: Measure | None, first: Measure | None) -> Content:
    if measure is None:
        return show.NONE
    relative = f"{measure.value / first.value:.3f}×" if first is not None and first.value else show.NONE
    return [measure.shown(measure.value), small(relative)]
