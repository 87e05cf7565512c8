"""Reports in a real browser: no message on the console, no sideways scrolling at any width."""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

from layerskip.evaluation.load.figures import summarize
from layerskip.evaluation.report import compare_reports, write_report
from layerskip.evaluation.run_folder import RunFolder

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
WIDTHS = (1280, 768, 390, 320)
SCROLLBAR = 20
LONG = "a_name_without_any_space_" * 12

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium")

# Frames are as wide as the window of a phone; a browser's own window can't be.
FRAMES = """<!DOCTYPE html><meta charset="utf-8"><title>frames</title><body>{frames}<pre id="widths"></pre><script>
addEventListener("load", () => {{
  const found = [...document.querySelectorAll("iframe")].map(frame => {{
    const root = frame.contentDocument.documentElement;
    frame.contentDocument.querySelectorAll("details").forEach(part => part.open = true);
    return [root.clientWidth, root.scrollWidth];
  }});
  document.getElementById("widths").textContent = JSON.stringify(found);
}});
</script></body>"""


@dataclass(frozen=True)
class Seen:
    widths: list[list[int]]
    """Of each frame: what is visible, and what it takes."""
    console: list[str]


def look(pages: Sequence[str], folder: Path) -> Seen:
    """Open pages in frames of all widths."""
    frames = "".join(
        f'<iframe srcdoc="{escape(page)}" style="width:{width}px;height:600px;border:0"></iframe>'
        for page in pages
        for width in WIDTHS
    )
    file = folder / "frames.html"
    file.write_text(FRAMES.format(frames=frames), encoding="utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --enable-logging=stderr"
    )
    command = [
        str(BROWSER),
        *flags.split(),
        "--v=0",
        f"--user-data-dir={folder / 'profile'}",
        "--dump-dom",
        file.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="widths">(\[.*?)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    return Seen(json.loads(unescape(found[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line])


def finish(folder: Path, kind: str, results: dict[str, Any], samples: Sequence[dict[str, Any]] = ({},)) -> Path:
    run = RunFolder(folder, kind, {"model": f"/models/{LONG}", "dataset": "humaneval", "nested": {LONG: [LONG] * 3}})
    for place, sample in enumerate(samples):
        run.add(str(place), sample)
    run.finish(results)
    return folder


def benchmark() -> dict[str, Any]:
    def strategy(name: str, speedup: float | None, **options: Any) -> dict[str, Any]:
        return {
            "name": name,
            "options": options,
            "samples": 64,
            "tokens": 1_234_567,
            "seconds": 5432.1,
            "tokens_per_second": 1_234.5 * (speedup or 1),
            "speedup": speedup,
            "speedup_low": speedup and 0.9 * speedup,
            "speedup_high": speedup and 1.1 * speedup,
            "time_to_first_token_s": {"median": 0.02, "p95": 0.04},
            "time_per_token_s": {"median": 0.002, "p95": 0.004},
            "acceptance_rate": 0.7,
            "drafted_by_position": [100] * 24,
            "accepted_by_position": list(range(96, 0, -4)),
            "seconds_drafting": 2000.0,
            "seconds_verifying": 3000.0,
            "peak_memory_bytes": 2**33,
            "metrics": dict.fromkeys(("rouge1", "rouge2", "rougeL", "bleu", "exact_match", "pass_at_1"), 0.4),
        }

    strategies = [
        strategy("autoregressive", 1.0),
        strategy("self_speculative", 2.1, exit_layer=4, num_speculations=12),
        strategy("adaptive", 2.4, stop=[LONG]),
        strategy(LONG, None),
    ]
    return {"strategies": strategies, "metrics_note": LONG}


def load_samples() -> list[dict[str, Any]]:
    rounds = {"num_drafts": 9, "num_draft_tokens": 80, "num_accepted_tokens": 40}
    histograms = {"draft_histogram": [9] * 9, "acceptance_histogram": list(range(9, 0, -1))}
    whole = {
        "attempt": 1,
        "seconds": 2.5,
        "first": 0.2,
        "gaps": [0.1] * 20,
        "piece_tokens": None,
        "tokens": 1234,
        "prompt_tokens": 99,
        "error": None,
        "speculation": rounds | histograms,
        "text": LONG,
        "prompt": LONG,
    }
    failed = {**whole, "first": None, "gaps": [], "error": {"kind": LONG, "message": LONG}}
    return [{**whole, "index": i, "start": i / 3, "first": 0.1 * (i + 1)} for i in range(12)] + [
        {**failed, "index": 12, "start": 4.0}
    ]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("runs")
    pieces = [["def ", "accepted"], [LONG, "corrected"], ["\n\n", "bonus"], ["<script>", "decoded"]] * 20
    samples = [{"index": 0, "strategy": LONG, "prompt": LONG, "text": LONG, "pieces": pieces}]
    grid = [
        {
            "exit_layer": e,
            "num_speculations": k,
            "acceptance_rate": e / 17,
            "tokens_per_second": 1000.0 * e + k,
            "predicted_tokens_per_second": 990.0 * e,
        }
        for e in range(1, 17)
        for k in range(1, 9)
    ]
    best = {"exit_layer": 16, "num_speculations": 8, "tokens_per_second": 16008.0, "speedup": 2.0}
    exits = [
        {
            "exit_layer": e,
            "tasks": {LONG: {"acc,none": e / 40, "acc_stderr,none": 0.01}},
            "speed": {"tokens_per_second": 9.0 * e},
        }
        for e in range(1, 33)
    ]
    divergence = {"prompt": 1, "position": 2, "expected": 3, "actual": None, "gap": 0.0004, "near_tie": True}
    setting = {"mode": "greedy", "exit_layer": 4, "num_speculations": 6, "equal": 3, "near_ties": 1, "errors": 0}
    settings = [{**setting, "tokens": 999, "drafted": 10, "accepted": 5, "divergences": [divergence] * 9}]
    first = finish(root / "first", "benchmark", benchmark(), samples)
    folders = [
        first,
        finish(root / "sweep", "sweep", {"method": "one_pass", "grid": grid, "best": best, "prediction_error": 0.1}),
        finish(root / "eval", "eval", {"exits": exits}),
        finish(root / "verify", "verify", {"settings": settings, "prompts": 4, "errors": 0, "near_ties": 1}),
    ]
    second = finish(root / LONG[:100], "benchmark", benchmark())
    requests = load_samples()
    told = {"url": f"http://{LONG}:8000", **summarize(requests, client_share=0.9)}
    folders.append(finish(root / "load", "bench-serve", told, requests))
    files = [*map(write_report, folders), compare_reports([first, second, first], root / "comparison.html")]
    return [file.read_text(encoding="utf-8") for file in files]


def test_reports_fit_and_are_silent(pages: list[str], tmp_path: Path) -> None:
    seen = look(pages, tmp_path)
    assert len(seen.widths) == len(WIDTHS) * len(pages)
    for (visible, taken), width in zip(seen.widths, [*WIDTHS] * len(pages), strict=True):
        assert width - SCROLLBAR <= visible <= width
        assert taken == visible
    assert seen.console == []


def test_what_is_wrong_would_be_seen(pages: list[str], tmp_path: Path) -> None:
    wide = pages[0].replace("<h1>", '<div style="width:2000px">wide</div><h1>')
    loud = pages[3].replace("<h1>", "<script>alert(1)</script><h1>")  # the page's policy refuses to run it
    seen = look([wide, loud], tmp_path)
    assert all(taken > visible for visible, taken in seen.widths[: len(WIDTHS)])
    assert any("script" in line and "Content Security Policy" in line for line in seen.console)
