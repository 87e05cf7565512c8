"""The report of `layerskip benchmark`: speed by strategy, acceptance of drafts, quality, texts."""

from collections.abc import Mapping, Sequence
from typing import Any

from layerskip.evaluation.benchmark.summary import empty_note
from layerskip.evaluation.report import numbers as show
from layerskip.evaluation.report.numbers import number
from layerskip.evaluation.report.page import Content, Html, Report, Row, figure, section, small, table, tag
from layerskip.evaluation.report.parts import mapping, numbers, objects, origin, subject
from layerskip.evaluation.report.plots import Axes, Bar, Series, Stack, bars, legend, lines, stacks
from layerskip.evaluation.report.texts import texts_section

BASELINE = "autoregressive"
OTHER_TEXT = frozenset({"early_exit"})
"""Strategies that generate another text than the model and so can't be named the fastest."""
DETAIL = 80
"""Characters of a strategy's options, at most."""

Strategy = dict[str, Any]


def benchmark_report(content: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Report:
    """The page of a benchmark."""
    configuration, results = mapping(content.get("configuration")), mapping(content.get("results"))
    strategies = objects(results.get("strategies"))
    best = best_strategy(strategies)
    headline, lead = _headline(best, strategies)
    about = subject(configuration)
    return Report(
        title=f"{headline} – layerskip benchmark",
        kind=" · ".join(filter(None, ("layerskip benchmark", about))),
        headline=headline,
        lead=[*lead, *filter(None, [empty_note(strategies)])],
        keys=_keys(best, strategies),
        sections=[
            _speed(strategies, best),
            _acceptance(strategies),
            _time(strategies),
            _latency(strategies),
            _quality(strategies, results.get("metrics_note")),
            texts_section(samples, [str(s.get("name")) for s in strategies]),
            *origin(content),
        ],
    )


def best_strategy(strategies: Sequence[Strategy]) -> Strategy | None:
    """The strategy with the highest speedup over autoregressive decoding that generates the model's own text."""
    measured = [s for s in strategies if number(s.get("speedup")) is not None and s.get("name") != BASELINE]
    fair = [s for s in measured if s.get("name") not in OTHER_TEXT]
    return max(fair, key=lambda s: number(s["speedup"]) or 0, default=None)


def _baseline(strategies: Sequence[Strategy]) -> Strategy | None:
    return next((s for s in strategies if s.get("name") == BASELINE), None)


def name_of(strategy: Mapping[str, Any]) -> str:
    """A strategy's name for the page."""
    return show.strategy_name(strategy.get("name"))


def _headline(best: Strategy | None, strategies: Sequence[Strategy]) -> tuple[str, list[str]]:
    if best is None:
        speeds = [(number(s.get("tokens_per_second")), s) for s in strategies]
        fastest = max(((speed, s) for speed, s in speeds if speed is not None), key=lambda pair: pair[0], default=None)
        if fastest is None:
            return "Nothing was measured", ["No strategy has a speed."]
        name = name_of(fastest[1])
        lead = "No speedup over autoregressive decoding was measured."
        return f"{show.significant(fastest[0])} tokens/s", [f"The fastest strategy is {name}. {lead}"]
    speedup = number(best["speedup"]) or 0.0
    low, high = number(best.get("speedup_low")), number(best.get("speedup_high"))
    against = f"as many tokens per second as {BASELINE} decoding"
    detail = show.shorten(show.options(best.get("options")), DETAIL)
    who = name_of(best) + (f" ({detail})" if detail else "")
    text = f"The fastest strategy, {who}, writes {show.ratio(speedup)} {against}"
    if low is not None and high is not None:
        text += f"; 95% interval {show.interval(low, high, '×')}."
        if low <= 1 <= high:
            text += " The interval holds 1: these samples don't show a difference."
    else:
        text += "."
    headline = f"{show.ratio(speedup)} as fast" if speedup >= 1 else "No strategy is faster"
    return headline, [text]


def _keys(best: Strategy | None, strategies: Sequence[Strategy]) -> list[tuple[str, str]]:
    baseline = _baseline(strategies)
    samples = numbers(number(s.get("samples")) for s in strategies)
    keys = []
    if best is not None:
        low, high = best.get("speedup_low"), best.get("speedup_high")
        keys += [
            ("Speedup, 95% interval", show.interval(low, high, "×")),
            (f"Tokens/s, {name_of(best)}", show.significant(best.get("tokens_per_second"))),
        ]
    if baseline is not None:
        keys.append((f"Tokens/s, {BASELINE}", show.significant(baseline.get("tokens_per_second"))))
    if best is not None:
        keys.append((f"Drafts accepted, {name_of(best)}", show.percent(best.get("acceptance_rate"))))
    if samples:
        keys.append(("Prompts", show.count(max(samples))))
    return keys


def _head(strategy: Strategy) -> Content:
    detail = show.shorten(show.options(strategy.get("options")), DETAIL)
    return [name_of(strategy), small(detail) if detail else None]


def _speed(strategies: Sequence[Strategy], best: Strategy | None) -> Html:
    relative = any(number(s.get("speedup")) is not None for s in strategies)
    items = [_bar(s, relative=relative, best=best) for s in strategies]
    title = "Speedup over autoregressive decoding" if relative else "Tokens per second"
    caption = (
        "Tokens per second against autoregressive decoding (the dashed line); whiskers are 95% bootstrap intervals."
        if relative
        else "Tokens per second. Without autoregressive decoding there is no speedup and no interval."
    )
    if any(s.get("name") in OTHER_TEXT for s in strategies):
        caption += " Early exit writes another text than the model, and is left out of the headline."
    rows = [
        Row(
            head=_head(s),
            cells=(
                show.significant(s.get("tokens_per_second")),
                show.ratio(s.get("speedup")),
                show.NONE if s.get("name") == BASELINE else show.interval(s.get("speedup_low"), s.get("speedup_high")),
                show.percent(s.get("acceptance_rate")) if has_drafts(s) else show.NONE,
                _per_round(s),
                show.count(s.get("tokens")),
                show.count(s.get("samples")),
            ),
            best=s is best,
        )
        for s in strategies
    ]
    columns = ("strategy", "tokens/s", "speedup", "95% interval", "accepted", "tokens a round", "tokens", "samples")
    drawn = figure(lambda width: bars(items, width, title, base=1.0 if relative else None), caption)
    return section("Speed by strategy", "Reading the prompt included.", drawn if items else None, table(columns, rows))


def _bar(strategy: Strategy, *, relative: bool, best: Strategy | None) -> Bar:
    name, speed = strategy.get("name"), number(strategy.get("tokens_per_second"))
    value = number(strategy.get("speedup")) if relative else speed
    if relative and value is None and name == BASELINE and speed is not None:
        value = 1.0
    label = show.ratio(value) if relative else show.significant(value)
    tone = "rest" if name == BASELINE else "accent" if strategy is best else "pale"
    low, high = number(strategy.get("speedup_low")), number(strategy.get("speedup_high"))
    return Bar(
        name=name_of(strategy),
        detail=show.options(strategy.get("options")),
        value=value,
        label=label,
        low=low if relative and name != BASELINE else None,
        high=high if relative and name != BASELINE else None,
        tone=tone,
    )


def _per_round(strategy: Strategy) -> str:
    length = number(strategy.get("mean_accepted_length"))
    return show.NONE if not length else f"{length:.2f}"


def has_drafts(strategy: Mapping[str, Any]) -> bool:
    """Whether anything was drafted."""
    drafted = strategy.get("drafted_by_position")
    return isinstance(drafted, list) and sum(numbers(map(number, drafted))) > 0


def acceptance_by_position(strategy: Mapping[str, Any]) -> list[tuple[float, float]]:
    """(position in the round from 1 on, share of accepted drafts at this position)."""
    drafted, accepted = strategy.get("drafted_by_position"), strategy.get("accepted_by_position")
    if not isinstance(drafted, list) or not isinstance(accepted, list):
        return []
    counts = zip(map(number, drafted), map(number, accepted), strict=False)
    return [(place, a / d) for place, (d, a) in enumerate(counts, start=1) if d and a is not None]


def full_name(strategy: Mapping[str, Any]) -> str:
    """Name and options in one line."""
    detail = show.options(strategy.get("options"))
    return name_of(strategy) + (f" ({detail})" if detail else "")


def _acceptance(strategies: Sequence[Strategy]) -> Html | None:
    found = [(s, points) for s in strategies if (points := acceptance_by_position(s))]
    if not found:
        return None
    series = [Series(name=show.shorten(full_name(s), DETAIL), points=points) for s, points in found]
    axes = Axes(
        x="draft's place in its round",
        y="drafts accepted",
        format_y=show.percent,
        tick_y=show.percent_tick,
        y_range=(0, 1),
    )
    note = "How many of the drafts at each place of a round became part of the text; all before them had to hold."
    drawn = figure(
        lambda width: lines(series, width, "Acceptance by position", axes), legend=legend([s.name for s in series])
    )
    places = sorted({int(x) for one in series for x, _ in one.points})
    rows = []
    for strategy, points in found:
        rates = dict(points)
        rows.append(Row(head=_head(strategy), cells=[show.percent(rates.get(place)) for place in places]))
    return section("Acceptance by position", note, drawn, table(["strategy", *map(str, places)], rows))


def time_parts(strategy: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """Shares of the time of drafting, verifying and everything else; None if they weren't measured."""
    total, drafting = number(strategy.get("seconds")), number(strategy.get("seconds_drafting"))
    verifying = number(strategy.get("seconds_verifying"))
    if not total or drafting is None or verifying is None or drafting + verifying <= 0:
        return None
    whole = max(total, drafting + verifying)
    return drafting / whole, verifying / whole, max(0.0, whole - drafting - verifying) / whole


def _time(strategies: Sequence[Strategy]) -> Html | None:
    found = [(s, parts) for s in strategies if (parts := time_parts(s)) is not None]
    if not found:
        return None
    names, tones = ("drafting", "verifying", "rest"), ("accent", "second", "rest")
    items = []
    for strategy, parts in found:
        tokens, total = number(strategy.get("tokens")), number(strategy.get("seconds"))
        each = f"{show.seconds(total / tokens)} a token" if tokens and total else ""
        detail = show.options(strategy.get("options"))
        items.append(
            Stack(name=name_of(strategy), detail=detail, parts=list(zip(names, parts, tones, strict=True)), label=each)
        )
    rows = [Row(head=_head(s), cells=[show.seconds(s.get("seconds")), *map(show.percent, parts)]) for s, parts in found]
    return section(
        "Where the time goes",
        "Drafting: the layers and heads that draft. Verifying: the other layers, the head over the drafts, acceptance. "
        "The rest: reading the prompt, steps without drafts, and what lies between rounds.",
        figure(lambda width: stacks(items, width, "Where the time goes"), legend=_tones(names, tones)),
        table(("strategy", "time", *names), rows),
    )


def _tones(names: Sequence[str], tones: Sequence[str]) -> Html:
    swatches = [
        tag(
            "svg",
            tag("rect", width=26, height=12, style=f"fill:var(--{tone})"),
            viewBox="0 0 26 12",
            aria_hidden="true",
        )
        for tone in tones
    ]
    return tag("ul", [tag("li", s, tag("span", n)) for s, n in zip(swatches, names, strict=True)], class_="legend")


def _latency(strategies: Sequence[Strategy]) -> Html | None:
    rows = []
    for s in strategies:
        first, each = mapping(s.get("time_to_first_token_s")), mapping(s.get("time_per_token_s"))
        times = [show.seconds(value.get(key)) for value in (first, each) for key in ("median", "p95")]
        rows.append(Row(head=_head(s), cells=[*times, show.memory(s.get("peak_memory_bytes"))]))
    if all(cell == show.NONE for row in rows for cell in row.cells):
        return None
    columns = ("strategy", "first token", "95th percentile", "each token", "95th percentile", "peak memory")
    return section(
        "Latency and memory", "Medians over prompts, and the time that 95% stay below.", table(columns, rows)
    )


def _quality(strategies: Sequence[Strategy], note: Any) -> Html | None:
    names = list(dict.fromkeys(name for s in strategies for name in mapping(s.get("metrics"))))
    remark = str(note) if note else None
    if not names and not remark:
        return None
    rows = [
        Row(head=_head(s), cells=[_metric(mapping(s.get("metrics")).get(name)) for name in names]) for s in strategies
    ]
    return section("Quality", remark or "Against the references.", table(["strategy", *names], rows) if names else None)


def _metric(value: Any) -> str:
    return show.significant(value, 4)
