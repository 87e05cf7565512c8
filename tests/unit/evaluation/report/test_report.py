"""Reports: whole and balanced pages that load nothing, say the right numbers and survive odd runs."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from layerskip.evaluation.report import compare_reports, write_report
from layerskip.evaluation.report.numbers import percent
from layerskip.evaluation.run_folder import SAMPLES_FILE, RunFolder

VOID = {"meta", "br", "link", "img", "input", "hr", "wbr"}
EVIL = '<script>alert(\'ü\')</script>" onload="x" & </pre></style>'


class Page(HTMLParser):
    """Reads a page strictly: tags must nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.rows: list[list[str]] = []
        self.styled: dict[str, list[str]] = {}
        self.classes: list[str] = []
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag in VOID:
            return
        self.open.append(tag)
        self.classes.append(dict(attrs).get("class") or "")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.classes.pop()

    def handle_data(self, data: str) -> None:
        if not self.open:
            return
        self.texts.setdefault(self.open[-1], []).append(data)
        self.styled.setdefault(self.classes[-1], []).append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += ("|" if self.open[-1] == "small" else "") + data

    def row(self, head: str) -> list[str]:
        """Cells of the first row whose head begins so."""
        return next(row[1:] for row in self.rows if row and row[0].startswith(head))

    def text(self) -> str:
        return " ".join(part for tag, parts in self.texts.items() if tag != "style" for part in parts)


def check(path: Path) -> Page:
    """Read a page that must be sound, whatever it says."""
    page = Page(path)
    assert page.source.startswith("<!DOCTYPE html>")
    assert {"script", "link", "img", "iframe", "object"}.isdisjoint(page.tags)
    assert not [(name, value) for name, value in page.attributes if name in ("src", "href") or name.startswith("on")]
    assert "@import" not in page.source
    assert "url(" not in page.source
    assert not re.search(r"\b(nan|inf|None|null)\b", page.text())
    assert not re.search(r'="[^"]*\b(nan|inf)\b[^"]*"', page.source)
    described = re.findall('<svg [^>]*role="img"[^>]*><title>[^<]+</title><desc>[^<]+</desc>', page.source)
    assert len(described) == page.source.count('role="img"')
    return page


def finish(
    folder: Path, kind: str, results: dict[str, Any], samples: list[dict[str, Any]] | None = None, **conf: Any
) -> Path:
    run = RunFolder(folder, kind, {"model": "demo", **conf})
    for place, sample in enumerate(samples or [{}]):
        run.add(str(place), sample)
    run.finish(results)
    return folder


def strategy(name: str, speed: float | None = 200.0, **fields: Any) -> dict[str, Any]:
    return {
        "name": name,
        "options": {},
        "samples": 12,
        "tokens": 1234,
        "seconds": 6.17,
        "tokens_per_second": speed,
        "speedup": None,
        "speedup_low": None,
        "speedup_high": None,
        "acceptance_rate": 0.0,
        "drafted_by_position": [],
        "accepted_by_position": [],
        "metrics": {},
        **fields,
    }


DRAFTING: dict[str, Any] = {
    "options": {"exit_layer": 4, "num_speculations": 3},
    "speedup": 1.756,
    "speedup_low": 1.614,
    "speedup_high": 1.926,
    "time_to_first_token_s": {"median": 0.0214, "p95": 1.5},
    "time_per_token_s": {"median": 0.00285, "p95": 0.0004},
    "acceptance_rate": 0.7125,
    "mean_accepted_length": 2.346,
    "drafted_by_position": [400, 300, 200],
    "accepted_by_position": [360, 150, 0],
    "seconds_drafting": 1.234,
    "seconds_verifying": 3.702,
    "peak_memory_bytes": 3 * 2**30,
    "metrics": {"rouge1": 0.41237, "bleu": 12.345678},
}


def sample(index: int, name: str, text: str, **fields: Any) -> dict[str, Any]:
    return {"index": index, "strategy": name, "prompt": EVIL, "reference": None, "text": text, **fields}


def test_benchmark_numbers(tmp_path: Path) -> None:
    results = {
        "strategies": [
            strategy("autoregressive", speedup=1.0, metrics={"rouge1": 0.5}),
            strategy("early_exit", 900.0, speedup=4.5),
            strategy("self_speculative", 351.0, **DRAFTING),
        ],
        "metrics_note": "ROUGE of <12> texts",
    }
    page = check(write_report(finish(tmp_path, "benchmark", results, dataset="humaneval", seed=0)))
    assert page.texts["h1"] == ["1.76× as fast"]
    assert "95% interval 1.61–1.93×." in page.text()
    assert page.row("autoregressive") == ["200", "1.00×", "–", "–", "–", "1,234", "12"]
    assert page.row("self-speculative") == ["351", "1.76×", "1.61–1.93", "71.2%", "2.35", "1,234", "12"]
    rows = [row[1:] for row in page.rows if row and row[0] == "self-speculative|exit 4, drafts 3"]
    assert rows[1] == ["90.0%", "50.0%", "0.0%"]
    assert rows[2] == ["6.17 s", "20.0%", "60.0%", "20.0%"]
    assert rows[3] == ["21.4 ms", "1.50 s", "2.85 ms", "400 µs", "3.00 GiB"]
    assert rows[4] == ["0.4124", "12.35"]
    assert ["autoregressive", "0.5000", "–"] in page.rows
    assert "ROUGE of <12> texts" in page.text()
    assert page.row("dataset") == ["humaneval"]
    assert any("layerskip benchmark --model demo --dataset humaneval --seed 0" in text for text in page.texts["pre"])
    assert "self-speculative exit 4, drafts 3: 1.76×" in page.text()


def test_a_difference_that_is_none_is_called_so(tmp_path: Path) -> None:
    close = {**DRAFTING, "speedup": 1.02, "speedup_low": 0.97, "speedup_high": 1.08}
    folder = finish(tmp_path / "a", "benchmark", {"strategies": [strategy("autoregressive"), strategy("x", **close)]})
    assert "don't show a difference" in check(write_report(folder)).text()
    slow = {**DRAFTING, "speedup": 0.8, "speedup_low": 0.7, "speedup_high": 0.9}
    folder = finish(tmp_path / "b", "benchmark", {"strategies": [strategy("autoregressive"), strategy("x", **slow)]})
    page = check(write_report(folder))
    assert page.texts["h1"] == ["No strategy is faster"]
    assert "0.80× as many" in page.text()


def test_texts_are_escaped_and_marked(tmp_path: Path) -> None:
    pieces = [["\n<b>", "accepted"], ["&amp;", "corrected"], ["\ud800\x00", "bonus"], ["é\n", "decoded"]]
    samples = [
        sample(0, "self_speculative", "\n<b>&amp;é\n", pieces=pieces, stats={"tokens_per_second": 351.2}),
        sample(0, "ngram", "\n<b>&amp;é\n", metrics={"rouge1": 0.25, "bad": None}),
        sample(0, "autoregressive", "\n<b>&amp;é\n", reference=EVIL),  # finished last, shown first
        sample(1, "adaptive", "x" * 100_000),
        sample(2, "adaptive", "", prompt="", pieces=[["y" * 5000, "accepted"]]),
        {"index": 3, "strategy": "adaptive"},
    ]
    folder = tmp_path / "run"
    finish(folder, "benchmark", {"strategies": [strategy("autoregressive"), strategy("self_speculative")]})
    with (folder / SAMPLES_FILE).open("a", encoding="utf-8") as file:  # as JSON may hold it
        file.writelines(json.dumps({"key": str(i), **s}) + "\n" for i, s in enumerate(samples))
    page = check(write_report(folder))
    assert page.styled["accepted"][:2] == ["accepted", "\n<b>"]
    assert page.styled["corrected"] == ["corrected", "&amp;"]
    assert page.styled["bonus"] == ["bonus", "\ufffd\ufffd"]
    assert EVIL in "".join(page.styled["pieces"])
    assert "The text of autoregressive." in page.text()
    assert "351 tokens/s, the text of autoregressive" in page.text()
    assert "97,000 more characters" in page.text()
    assert "2,000 more characters" in page.text()
    assert len(page.source) < 100_000


@pytest.mark.parametrize(
    "strategies",
    [
        [],
        None,
        [{}],
        [strategy("adaptive", None, samples=0, tokens=0, seconds=0.0)],
        [strategy("autoregressive", 0.0, speedup=float("nan"))],
        [
            strategy("日本語" * 40, options={"stop": [EVIL] * 20, "n": None}),
            strategy(EVIL, metrics={EVIL: None, "m": 1}),
        ],
        [
            strategy(
                "x", drafted_by_position=[0, 5], accepted_by_position=[0], seconds_drafting=9.0, seconds_verifying=1
            )
        ],
        [strategy(f"s{i}", **DRAFTING) for i in range(40)],
    ],
)
def test_odd_benchmarks(tmp_path: Path, strategies: Any) -> None:
    check(write_report(finish(tmp_path, "benchmark", {"strategies": strategies, "metrics_note": None}, text=EVIL)))


def setting(layer: int, length: int, speed: float | None, predicted: float | None = None) -> dict[str, Any]:
    rate = min(1.0, 0.3 + layer / 20)
    fields = {"acceptance_rate": rate, "tokens_per_second": speed, "predicted_tokens_per_second": predicted}
    return {"exit_layer": layer, "num_speculations": length, **fields, "total_time": None, "time_per_token": None}


def test_sweep_numbers(tmp_path: Path) -> None:
    grid = [
        setting(e, k, 100.0 * e + k, 110.0 * e) if k < 8 else setting(e, k, None, 7.5)
        for e in range(1, 17)
        for k in range(1, 9)
    ]
    results = {
        "method": "one_pass",
        "autoregressive_tokens_per_second": 300.0,
        "grid": grid,
        "best": {"exit_layer": 16, "num_speculations": 7, "tokens_per_second": 1607.0, "speedup": 5.357},
        "prediction_error": 0.0456,
    }
    page = check(write_report(finish(tmp_path, "sweep", results)))
    assert page.texts["h1"] == ["Exit 16, 7 drafts"]
    assert "5.36× as many as autoregressive" in page.text()
    assert page.styled[""].count("1,607") >= 2  # once in each drawing
    assert "≈7.50" in page.text()
    assert "exit 16, 7 drafts: 1,607 tokens/s, 5.36× autoregressive, 100.0% accepted" in page.text()
    assert page.row("exit 2, 3 drafts") == ["40.0%", "203", "220", "–", "–"]
    assert "30 of 128 settings are slower" in page.text()  # exits 1 and 2, and the predicted ones of 14 more
    errors = sorted(abs(110 * e / (100 * e + k) - 1) for e in range(1, 17) for k in range(1, 8))
    assert f"off by {percent((errors[55] + errors[56]) / 2)} in the median, and by {percent(errors[-1])}" in page.text()
    assert "4.6%" in page.text()


@pytest.mark.parametrize(
    "results",
    [
        {},
        {"grid": [], "best": None, "method": None},
        {"grid": [setting(1, 1, None), setting(1, 1, None)], "best": {}},
        {"grid": [setting(4, 6, 10.0)], "best": {"exit_layer": 4, "num_speculations": 6}, "method": "exhaustive"},
        {"grid": [setting(e, 2, 0.0, 0.0) for e in (1, 9)], "autoregressive_tokens_per_second": 0.0},
        {"grid": [setting(e, 1, 1e-9 * e, 1e9) for e in range(1, 65)], "prediction_error": math.inf},
    ],
)
def test_odd_sweeps(tmp_path: Path, results: dict[str, Any]) -> None:
    check(write_report(finish(tmp_path, "sweep", results)))


def test_eval_numbers(tmp_path: Path) -> None:
    exits = [
        {
            "exit_layer": layer,
            "tasks": {
                "arc": {"acc,none": layer / 16, "acc_stderr,none": 0.0213, "alias": "arc"},
                "wiki": {"word_perplexity,none": 5000.0 / layer**2, "acc,none": None},
            },
            "speed": {"tokens_per_second": 1600.0 / layer, "peak_memory_bytes": 2**20},
        }
        for layer in (16, 2, 8)
    ]
    page = check(write_report(finish(tmp_path, "eval", {"exits": exits}, tasks=["arc", "wiki"])))
    assert page.row("arc, acc") == ["0.1250|± 0.021", "0.5000|± 0.021", "1.000|± 0.021"]
    assert page.row("wiki, word_perplexity") == ["1,250", "78.12", "19.53"]
    assert page.row("tokens per second") == ["800", "200", "100"]
    assert page.row("peak memory bytes") == ["1.00 MiB"] * 3
    assert page.styled["muted"].count("logarithmic") == 2
    assert not [row for row in page.rows if row and row[0].startswith(("arc, alias", "wiki, acc"))]


@pytest.mark.parametrize(
    "results",
    [
        {},
        {"exits": [{"exit_layer": 3}]},
        {"exits": [{"exit_layer": 3, "tasks": {EVIL: {EVIL: 0.5}}}]},
        {
            "exits": [
                {"exit_layer": e, "tasks": {f"task{t}": {"f1": -1.0 * t} for t in range(40)}} for e in range(1, 33)
            ]
        },
    ],
)
def test_odd_evaluations(tmp_path: Path, results: dict[str, Any]) -> None:
    check(write_report(finish(tmp_path, "eval", results)))


def test_verify_numbers(tmp_path: Path) -> None:
    tie = {"prompt": 3, "position": 17, "expected": 28765, "actual": None, "gap": 0.00031, "near_tie": True}
    error = {**tie, "prompt": 5, "actual": 99, "gap": None, "near_tie": False}
    counts = {"exit_layer": 4, "num_speculations": 6, "equal": 10, "tokens": 1280, "drafted": 800, "accepted": 600}
    settings = [
        {**counts, "mode": "greedy", "near_ties": 1, "errors": 0, "divergences": [tie]},
        {**counts, "mode": "coupled", "near_ties": 0, "errors": 1, "divergences": [error]},
    ]
    results = {"settings": settings, "prompts": 22, "tokens": 2560, "differences": 2, "near_ties": 1, "errors": 1}
    page = check(write_report(finish(tmp_path / "a", "verify", results)))
    assert page.texts["h1"] == ["1 error"]
    assert page.row("greedy") == ["4", "6", "10", "1", "0", "1,280", "75.0%"]
    assert page.row("near-tie") == ["greedy", "4", "6", "3", "17", "28765", "end", "0.000310"]
    assert page.row("error") == ["coupled", "4", "6", "5", "17", "28765", "99", "–"]
    assert page.texts["dd"] == ["22", "2,560", "2", "1", "1"]
    for name, changed, headline in (
        ("b", {"errors": 0}, "Nothing lost"),
        ("c", {"errors": 0, "near_ties": 0, "settings": []}, "Nothing lost"),
        ("d", {"errors": None, "settings": [{}] * 500}, "No verdict"),
    ):
        assert check(write_report(finish(tmp_path / name, "verify", {**results, **changed}))).texts["h1"] == [headline]


def test_differences_may_stand_in_the_samples(tmp_path: Path) -> None:
    divergence = {"prompt": 1, "position": 2, "expected": 3, "actual": 4, "gap": 0.5, "near_tie": True}
    samples = [{"mode": "greedy", "exit_layer": 2, "num_speculations": 4, "divergence": divergence}] * 300
    results = {"settings": [], "prompts": 300, "tokens": 1, "differences": 300, "near_ties": 300, "errors": 0}
    page = check(write_report(finish(tmp_path, "verify", results, samples)))
    assert page.row("near-tie") == ["greedy", "2", "4", "1", "2", "3", "4", "0.500"]
    assert "The first 200 of 300." in page.text()


def test_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerskip.machine.time.strftime", lambda *_: "2026-01-01T00:00:00Z")  # one date for all runs

    def run(name: str, speed: float, **conf: Any) -> Path:
        strategies = [strategy("autoregressive", speed), strategy("adaptive", 3 * speed, metrics={"bleu": 20.0})]
        return finish(tmp_path / name, "benchmark", {"strategies": strategies}, seed=0, **conf)

    first = run("a/run", 100.0, decoding={"top_k": 5, "top_p": 1.0})
    second = run("b/run", 150.0, decoding={"top_k": 7, "top_p": 1.0}, text=EVIL)
    third = finish(tmp_path / "third", "benchmark", {"strategies": [strategy("ngram", 50.0)]}, seed=0)
    page = check(compare_reports([first, second, third], tmp_path / "out.html"))
    assert page.row("decoding.top_k") == ["5", "7", "–"]
    assert page.row("text") == ["–", EVIL, "–"]
    assert not [row for row in page.rows if row and row[0] in ("seed", "model", "date")]
    assert page.row("autoregressive: tokens/s") == ["100|1.000×", "150|1.500×", "–"]
    assert page.row("n-gram: tokens/s") == ["–", "–", "50.0|–"]
    assert page.row("adaptive: bleu") == ["20.00|1.000×", "20.00|1.000×", "–"]
    assert "450 (1.50×)" in page.text()
    labels = [row[0] for row in page.rows if row and row[1:] == page.rows[1][1:]]
    assert [label[-6:] for label in labels] == ["/a/run", "/b/run", "third"]
    assert check(compare_reports([first, first], tmp_path / "same.html")).text().count("/a/run (2)") > 1


@pytest.mark.parametrize(
    ("kind", "results", "head", "cells"),
    [
        (
            "sweep",
            {"autoregressive_tokens_per_second": 50.0, "grid": [setting(2, 3, None, 60.0)]},
            "exit 2, drafts 3",
            "60.0|1.000×",
        ),
        (
            "eval",
            {"exits": [{"exit_layer": 2, "tasks": {"arc": {"acc,none": 0.5}}}]},
            "arc, acc, exit 2",
            "0.5000|1.000×",
        ),
        ("verify", {"prompts": 3, "errors": 0, "near_ties": 2}, "near-ties", "2|1.000×"),
        ("verify", {"prompts": 3, "errors": 0, "near_ties": 2}, "errors", "0|–"),
    ],
)
def test_comparison_of_other_kinds(tmp_path: Path, kind: str, results: dict[str, Any], head: str, cells: str) -> None:
    folders = [finish(tmp_path / name, kind, results) for name in ("a", "b")]
    page = check(compare_reports(folders, tmp_path / "out.html"))
    assert page.row(head) == [cells, cells]
    assert "The same in all runs." in page.text()
