"""The step of `on_gpu.py` for CUDA graphs: costs of replays, and speed with and without graphs, greedy and sampled.

Its results go into a `gpu_steps.Report`. On a CPU, the functions that graphs would hold are called as they are.
"""

import math
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_steps import Report

STEP_AGREES = 1.6
"""Ratio of a step's measured cost to its seconds within a text, or its inverse, that may be reached: the two are timed
in different loops."""
SLOWER = 1.1
"""Ratio of a replayed step's seconds to those without graphs that would mean that graphs are of no use."""
RULES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "temperature": {"do_sample": True, "temperature": 0.8, "seed": 1},
    "top-k and top-p": {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 1},
}


def graphs(report: "Report") -> None:
    """Measure rounds that are captured beside the same rounds without graphs, with a random network that agrees."""
    import torch
    from synthetic import make_synthetic

    shape, exit_layer = ("tiny", 2) if report.small else ("240m", 4)
    dtype = "float32" if report.small else "bfloat16"
    if report.small:
        torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        make_synthetic(
            Path(folder), shape, exit_layer=exit_layer, agreement=0.9, dtype=getattr(torch, dtype), device=report.device
        )
        captured, calls = _load(report, folder, dtype, graphs=True), _load(report, folder, dtype, graphs=False)
        _choices(report)
        for num_rows in (1, 2) if report.small else (1, 8):
            _speeds(report, captured, calls, exit_layer, num_rows)
            _costs(report, captured, calls, exit_layer, num_rows)
    for made in captured.decoder.compiled:
        report.check(made.problem is None, f"capture failed: {made.problem}")
    kinds = {made.shape.kind for made in captured.decoder.compiled}
    report.check(kinds >= {"round", "draft", "last", "pass"}, f"only {', '.join(sorted(kinds))} was captured")
    seconds = [made.seconds for made in captured.decoder.compiled]
    report.keep(captured=len(seconds), capture_s={"median": median(seconds), "most": max(seconds)})
    one = report.found["costs, 1 rows"]
    report.keep(
        headline=f"{shape}, 1 row: a step {1e3 * one['graphs']['step']:.2f} ms in graphs, "
        f"{1e3 * one['calls']['step']:.2f} ms without; asking {1e6 * one['graphs']['asking']:.0f} us a draft; "
        + ", ".join(
            f"{name} {found['adaptive']:.2f}x adaptive"
            for name in RULES
            if (found := report.found.get(f"{name}, 1 rows")) is not None
        )
    )


def _load(report: "Report", folder: str, dtype: str, *, graphs: bool) -> Any:
    import torch

    import layerskip
    from layerskip.checkpoint.checkpoint import open_checkpoint
    from layerskip.checkpoint.loading.network import load_decoder
    from layerskip.checkpoint.loading.placement import choose_context
    from layerskip.checkpoint.loading.plan import LoadingPlan
    from layerskip.language_model import LanguageModel

    if not report.small or not graphs:
        compile_: Any = "auto" if graphs else "off"
        return layerskip.load(folder, dtype=dtype, device=report.device, kernels="torch", compile=compile_)  # type: ignore[arg-type]
    checkpoint = open_checkpoint(folder)
    plan = LoadingPlan(
        dtype=getattr(torch, dtype),
        device=torch.device("cpu"),
        context=choose_context(checkpoint.config, None),
        rounds="graphs",
    )
    return LanguageModel(checkpoint, load_decoder(checkpoint.config, checkpoint.weights, plan))


def _choices(report: "Report") -> None:
    """Time the choice of tokens as graphs make it, by what rows ask for: what sampling adds to each draft."""
    import torch

    from layerskip.model.draw import Draw
    from layerskip.model.graphs.choosing import choose, filtered, noise_after
    from layerskip.model.graphs.program import Recorder
    from layerskip.model.graphs.rows import RowInputs, RowTensors, draws_of

    device = torch.device(report.device)
    size, found = (2_000, {}) if report.small else (128_256, {})
    logits = torch.randn(1, 1, size, generator=torch.Generator().manual_seed(0)).to(device)
    for name, (temperature, top_k, top_p) in {
        "no": (0.0, 0, 1.0), "noise": (0.8, 0, 1.0), "filters": (0.8, 50, 0.95)
    }.items():  # fmt: skip
        draw = Draw(temperatures=(temperature,), top_k=(top_k,), top_p=(top_p,), min_p=(0.0,), seeds=(1,))
        inputs = RowInputs(1, device)
        inputs.fill([0], [10], 100, draw=draw)

        kind = draws_of(draw)

        def call(inputs: Any = inputs, draws: Any = kind) -> Any:
            rows = RowTensors.of(inputs.tensor)
            noise = None if draws == "no" else noise_after(rows, 0, 1, size)
            return choose(filtered(logits, rows, draws), rows, noise)

        replay: Any = call
        if device.type == "cuda":
            graph, chosen = Recorder(device).record(call)
            graph.replay()
            report.check(torch.equal(chosen, call()), f"a replayed choice ({name}) is another one")
            replay = graph.replay
        found[name] = 1e6 * _seconds_of(replay, device, 5 if report.small else 200)
    report.keep(choice_us=found)


def _seconds_of(call: Any, device: Any, times: int) -> float:
    import torch

    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(times):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / times


def _costs(report: "Report", captured: Any, calls: Any, exit_layer: int, num_rows: int) -> None:
    """Measure costs with and without graphs, and hold those of graphs against the text that was just written."""
    from layerskip.decoding.adaptive.cost_cache import read_costs, write_costs
    from layerskip.decoding.adaptive.costs import measure_costs

    figures: dict[str, Any] = {}
    for name, lm in (("graphs", captured), ("calls", calls)):
        costs = measure_costs(lm.decoder, num_rows)
        parts = [*costs.layer, *costs.fixed, costs.draft_layer, costs.draft_head, costs.draft_fixed, costs.asking]
        report.check(all(map(math.isfinite, parts)), f"costs of {name} aren't numbers")
        figures[name] = {
            "step": costs.step(),
            "round of 4 drafts": costs.round(exit_layer, 4),
            "verification of 5": costs.verification(0, 4),
            "draft layer": costs.draft_layer,
            "draft head": costs.draft_head,
            "asking": costs.asking,
            "plausible": costs.is_plausible,
        }
        write_costs(lm.decoder, num_rows, costs)
    report.keep(**{f"costs, {num_rows} rows": figures})
    mine, theirs = figures["graphs"]["step"], figures["calls"]["step"]
    report.check(report.small or mine < SLOWER * theirs, f"{num_rows} rows: a replayed step takes {mine / theirs:.2f}x")
    within = report.found[f"greedy, {num_rows} rows"]["step_s"]
    report.check(
        report.small or 1 / STEP_AGREES < mine / within < STEP_AGREES,
        f"{num_rows} rows: a step costs {1e3 * mine:.2f} ms, and takes {1e3 * within:.2f} ms within a text",
    )
    kept = [read_costs(lm.decoder, num_rows) for lm in (captured, calls)]
    report.check(None not in kept and kept[0] != kept[1], "costs with and without graphs are kept as one")


def _speeds(report: "Report", captured: Any, calls: Any, exit_layer: int, num_rows: int) -> None:
    """Tokens/s by the ways to decode, interleaved; adaptive also without early stops."""
    from synthetic import random_prompts

    prompts = random_prompts(captured.config.vocab_size, num_rows)
    new, repetitions = (14, 1) if report.small else (96, 3)
    fixed = {"generation_strategy": "self_speculative", "exit_layer": exit_layer, "num_speculations": 4}
    ways: dict[str, tuple[Any, dict[str, Any]]] = {
        "calls": (calls, {"generation_strategy": "autoregressive"}),
        "graphs": (captured, {"generation_strategy": "autoregressive"}),
        "calls, 4 drafts": (calls, fixed),
        "4 drafts": (captured, fixed),
        "adaptive": (captured, {"generation_strategy": "adaptive"}),
    }
    for name, rules in RULES.items():
        speeds: dict[str, list[float]] = {way: [] for way in ways}
        texts: dict[str, list[list[int]]] = {}
        for repetition in range(repetitions + 1):  # the first one captures
            for way, (lm, options) in ways.items():
                done = lm.generate(prompts, max_new_tokens=new, ignore_eos=True, **options, **rules)
                texts[way] = [result.token_ids for result in done]
                if repetition:
                    seconds = max(r.stats.seconds - r.stats.time_to_first_token_s for r in done)
                    speeds[way].append(num_rows * (new - 1) / seconds)
        rates = {way: median(values) for way, values in speeds.items()}
        differ = sum(a != b for a, b in zip(texts["graphs"], texts["4 drafts"], strict=True))
        report.keep(
            **{
                f"{name}, {num_rows} rows": {
                    "tokens_per_second": rates,
                    "step_s": num_rows / rates["graphs"],
                    "graphs": rates["graphs"] / rates["calls"],
                    "4 drafts": rates["4 drafts"] / rates["graphs"],
                    "adaptive": rates["adaptive"] / rates["graphs"],
                    "texts that differ": differ,  # in 16 bits near-ties do; `verify` tells these from errors
                }
            }
        )
        report.check(not report.small or not differ, f"{name}, {num_rows} rows: {differ} texts differ")
