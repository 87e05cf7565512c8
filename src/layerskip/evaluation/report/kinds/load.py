"""The report of `layerskip bench-serve`: throughput, latencies, the run over time, acceptance, errors."""

from collections.abc import Mapping, Sequence
from typing import Any

from layerskip.evaluation.load.figures import PERCENTILES, percentile, tokens_of
from layerskip.evaluation.report import numbers as show
from layerskip.evaluation.report.numbers import number
from layerskip.evaluation.report.page import Html, Report, Row, figure, section, table
from layerskip.evaluation.report.parts import mapping, numbers, objects, origin, subject
from layerskip.evaluation.report.plots import Axes, Bar, Series, bars, legend, lines
from layerskip.evaluation.report.texts import texts_section

BUSY = 0.8
"""Share of a core above which the client itself may have limited the load."""
PIECES = 1.005
"""Tokens in a piece of text on average, above which that is said."""
BINS = 40
"""Parts of a run whose throughput is drawn, at most."""
TIMES = {
    "time_to_first_token_s": "First token",
    "inter_token_s": "Between tokens",
    "time_per_token_s": "A token, mean of each answer",
    "piece_gap_s": "Between pieces of text",
    "end_to_end_s": "Whole answer",
}
"""Fields with latencies, and their names."""

Sample = Mapping[str, Any]


def load_report(content: Mapping[str, Any], samples: Sequence[Sample]) -> Report:
    """The page of a load."""
    configuration, results = mapping(content.get("configuration")), mapping(content.get("results"))
    headline = f"{show.significant(results.get('output_tokens_per_second'))} tokens/s"
    answered, requests = number(results.get("answered")) or 0, number(results.get("requests")) or 0
    lead = (
        f"{describe_load(configuration)}: {show.count(answered)} of {show.count(requests)} requests were answered in "
        f"{show.seconds(results.get('seconds'))}, {show.significant(results.get('requests_per_second'))} a second."
    )
    whole = [sample for sample in samples if sample.get("error") is None and number(sample.get("seconds")) is not None]
    return Report(
        title=f"{headline} – layerskip bench-serve",
        kind=" · ".join(filter(None, ("layerskip bench-serve", str(results.get("url") or ""), subject(configuration)))),
        headline=headline,
        lead=[lead, *notes(results)],
        keys=_keys(results),
        sections=[
            _latencies(results),
            _percentiles(whole),
            _over_time(whole),
            _acceptance(mapping(results.get("speculation"))),
            _errors(objects(results.get("errors"))),
            texts_section(whole, []),
            *origin(content),
        ],
    )


def describe_load(configuration: Mapping[str, Any]) -> str:
    """The load in a few words."""
    rate = number(configuration.get("request_rate"))
    if rate is not None:
        return f"{show.significant(rate)} requests a second, arriving at random"
    clients = number(configuration.get("concurrency")) or 1
    return "One client" if clients == 1 else f"{show.count(clients)} clients, each waiting for its answer"


def notes(results: Mapping[str, Any]) -> list[str]:
    """Sentences on acceptance, on how tokens were counted, and on the client."""
    found = []
    if speculation := mapping(results.get("speculation")):
        found.append(
            f"Of {show.count(speculation.get('num_draft_tokens'))} drafts, "
            f"{show.percent(speculation.get('draft_acceptance_rate'))} were accepted: "
            f"{show.significant(speculation.get('mean_acceptance_length'))} tokens a round with drafts."
            if number(speculation.get("num_draft_tokens"))
            else "The server drafted nothing."
        )
    if results.get("tokens_counted_by") in ("pieces", "both"):
        which = "some answers" if results["tokens_counted_by"] == "both" else "the answers"
        found.append(f"The server doesn't tell how many tokens {which} have: each piece of text counts as one.")
    per_piece = number(results.get("tokens_per_piece"))
    if per_piece and per_piece > PIECES:
        told = number(mapping(results.get("inter_token_s")).get("count"))
        found.append(
            f"A piece of text holds {show.significant(per_piece)} tokens on average"
            + ("." if told else ", and the server doesn't tell how many each has: no time between tokens is known.")
        )
    share = number(results.get("client_share"))
    if share is not None and share > BUSY:
        found.append(
            f"The client was busy for {show.percent(share)} of the time: the server may be faster than these figures."
        )
    return found


def _keys(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    first, whole = mapping(results.get("time_to_first_token_s")), mapping(results.get("end_to_end_s"))
    each = mapping(results.get("inter_token_s"))
    each = each if number(each.get("count")) else mapping(results.get("time_per_token_s"))
    keys = [
        ("Requests/s", show.significant(results.get("requests_per_second"))),
        ("First token, median", show.seconds(first.get("p50"))),
        ("First token, p99", show.seconds(first.get("p99"))),
        ("Each token, median", show.seconds(each.get("p50"))),
        ("Whole answer, p99", show.seconds(whole.get("p99"))),
    ]
    speculation = mapping(results.get("speculation"))
    if number(speculation.get("draft_acceptance_rate")) is not None:
        keys.append(("Drafts accepted", show.percent(speculation["draft_acceptance_rate"])))
    return keys


def _latencies(results: Mapping[str, Any]) -> Html | None:
    columns = ("mean", *(f"p{percent}" for percent in PERCENTILES), "max")
    rows = []
    for name, title in TIMES.items():
        found = mapping(results.get(name))
        if number(found.get("count")):
            cells = [show.seconds(found.get(column)) for column in columns]
            rows.append(Row(head=title, cells=[*cells, show.count(found.get("count"))]))
    if not rows:
        return None
    note = (
        "As the client saw them, of requests that were answered in full. A piece of text may hold several tokens; the "
        "time between tokens is the piece's, shared among them."
    )
    return section("Latency", note, table(["", *columns, "values"], rows))


def _percentiles(samples: Sequence[Sample]) -> Html | None:
    series = []
    for name, title in (("first", "first token"), ("seconds", "whole answer")):
        ordered = sorted(numbers(number(sample.get(name)) for sample in samples))
        if len(ordered) > 1 and ordered[0] > 0:
            shares = (0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99, 100)
            series.append(Series(name=title, points=[(share, percentile(ordered, share)) for share in shares]))
    if not series:
        return None
    axes = Axes(
        x="share of requests that took no longer, %",
        y="seconds",
        format_y=show.seconds,
        format_x=show.significant,
        log=True,
        whole_x=False,
    )
    drawn = figure(
        lambda width: lines(series, width, "Latency by percentile", axes), legend=legend([s.name for s in series])
    )
    return section("Spread", "How long the fastest, the middle and the slowest requests took.", drawn)


def throughput_by_time(samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """(seconds since the beginning, output tokens a second) of equal parts of a run.

    The first piece counts as one token, and the others share the rest, where it isn't known how many each has.
    """
    times: list[tuple[float, float]] = []
    offset, offsets = 0.0, dict[int, float]()
    for attempt in sorted({int(sample["attempt"]) for sample in samples}):
        offsets[attempt] = offset
        offset += max(s["start"] + s["seconds"] for s in samples if s["attempt"] == attempt)
    for sample in samples:
        if sample["first"] is None:
            continue
        counts = sample["piece_tokens"]
        rest = (tokens_of(sample) - 1) / max(1, len(sample["gaps"]))
        at = offsets[int(sample["attempt"])] + sample["start"] + sample["first"]
        times.append((at, 1 if counts is None else counts[0]))
        for place, gap in enumerate(sample["gaps"], start=1):
            at += gap
            times.append((at, rest if counts is None else counts[place]))
    if not times or offset <= 0:
        return []
    size = offset / min(BINS, max(2, len(samples)))
    bins = [0.0] * round(offset / size)
    for at, tokens in times:
        bins[min(len(bins) - 1, int(at / size))] += tokens
    return [((place + 0.5) * size, tokens / size) for place, tokens in enumerate(bins)]


def _over_time(samples: Sequence[Sample]) -> Html | None:
    points = throughput_by_time(samples)
    if not points:
        return None
    most = max(y for _, y in points)
    axes = Axes(
        x="seconds since the first request",
        y="output tokens/s",
        format_x=show.significant,
        whole_x=False,
        y_range=(0, most or 1),
    )
    drawn = figure(lambda width: lines([Series(name="", points=points)], width, "Throughput over time", axes))
    return section("Over time", "At the ends fewer requests are running.", drawn)


def _acceptance(speculation: Mapping[str, Any]) -> Html | None:
    drafted, accepted = speculation.get("drafted_by_position"), speculation.get("accepted_by_position")
    if not isinstance(drafted, list) or not isinstance(accepted, list):
        return None
    pairs = [(number(d), number(a)) for d, a in zip(drafted, accepted, strict=False)]
    items = [
        Bar(name=f"draft {place}", detail=f"{show.count(d)} drafted", value=a / d, label=show.percent(a / d))
        for place, (d, a) in enumerate(pairs, start=1)
        if d and a is not None
    ]
    note = "How many of the drafts at each place of a round became part of the text; all before them had to hold."
    drawn = figure(lambda width: bars(items, width, "Acceptance by position"))
    return section("Acceptance by position", note, drawn) if items else None


def _errors(errors: Sequence[Mapping[str, Any]]) -> Html | None:
    rows = [
        Row(head=str(error.get("kind")), cells=[show.count(error.get("count")), str(error.get("example") or "")])
        for error in errors
    ]
    note = "Requests that weren't answered in full, and one message of each kind."
    return section("Errors", note, table(("kind", "requests", "such as"), rows, words=(2,))) if rows else None
