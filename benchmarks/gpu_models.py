"""The steps of `on_gpu.py` that run models: parity with transformers, losslessness, speed, training.

Each adds its results to a `gpu_steps.Report`. On a CPU everything is as small as possible.
"""

import json
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_steps import Report

ROOT = Path(__file__).resolve().parents[1]
FLOAT32_TOLERANCE = 1e-3
"""Largest difference between our float32 logits and transformers'; logits are about 1, and TF32 is off."""
BFLOAT16_SHARE, BFLOAT16_ERROR = 1.25, 2e-2
"""Ratio to the distance of transformers' own bfloat16 from float32, or relative norm, that our bfloat16 may reach."""
LOSS_FALL = 0.5
"""Nats by which the training loss must fall."""
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 32},
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 48, "sliding_window_pattern": 2},
}


def parity(report: "Report") -> None:
    """Compare the logits of random models of several families between our decoder and transformers, on the device."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    length = 64 if report.small else 1300  # more than one chunk of the prompt
    for family, switches in FAMILIES.items():
        with TemporaryDirectory() as folder:
            _random_model(Path(folder), family, switches, small=report.small)
            figures = _compare_logits(Path(folder), report.device, length)
        report.keep(**{family: figures})
        worst, ours, theirs = figures["float32_difference"], figures["bfloat16_error"], figures["bfloat16_transformers"]
        report.check(worst <= FLOAT32_TOLERANCE, f"{family}, float32: logits differ by {worst:.2g}")
        allowed = max(BFLOAT16_ERROR, BFLOAT16_SHARE * theirs)
        report.check(ours <= allowed, f"{family}, bfloat16: error {ours:.3g}, transformers' {theirs:.3g}")
        report.check(
            figures["cached_difference"] <= FLOAT32_TOLERANCE, f"{family}: token by token differs from at once"
        )
    worst = max(report.found[family]["float32_difference"] for family in FAMILIES)
    report.keep(headline=f"largest difference {worst:.1e} (at most {FLOAT32_TOLERANCE})")


def _random_model(folder: Path, family: str, switches: Mapping[str, Any], *, small: bool) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    width, layers, vocabulary = (64, 4, 512) if small else (1024, 8, 32_000)
    config = AutoConfig.for_model(
        family,
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        eos_token_id=None,
        pad_token_id=None,
        bos_token_id=None,
        **switches,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(0.1 * torch.randn_like(weight))
            else:
                weight.copy_(torch.randn_like(weight) / weight.shape[-1] ** 0.5)
    model.save_pretrained(folder)


def _compare_logits(folder: Path, device: str, length: int) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    import layerskip

    logits: dict[str, torch.Tensor] = {}
    lm = layerskip.load(str(folder), device=device, dtype="float32", kernels="torch")
    tokens = torch.randint(2, lm.config.vocab_size, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    for dtype in ("float32", "bfloat16"):
        logits[dtype] = layerskip.load(str(folder), device=device, dtype=dtype, kernels="torch").logits(tokens)
        theirs = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="eager"
        ).to(device)
        with torch.inference_mode():
            logits[f"{dtype} transformers"] = theirs.eval()(torch.tensor([tokens], device=device)).logits[0].float()
    reference = logits["float32 transformers"]
    cached = _last_logits(lm.decoder, tokens, 12)

    def error(name: str) -> float:
        return float((logits[name] - reference).norm() / reference.norm())

    return {
        "float32_difference": float((logits["float32"] - reference).abs().max()),
        "cached_difference": float((cached - reference[-12:]).abs().max()),
        "bfloat16_error": error("bfloat16"),
        "bfloat16_transformers": error("bfloat16 transformers"),
    }


def _last_logits(decoder: Any, tokens: list[int], number: int) -> Any:
    """Logits after the last tokens of a text, which are read one at a time."""
    import torch

    cache, logits = decoder.new_cache(1, len(tokens)), []
    with torch.inference_mode():
        for part in (tokens[:-number], *([token] for token in tokens[-number:])):
            positions = decoder.place(cache, cache.lengths, len(part))
            hidden = decoder.embed(torch.tensor([part], device=decoder.device))
            logits.append(decoder.unembed(decoder.run_layers(hidden, positions, cache, 0, decoder.num_layers)[:, -1:]))
            cache.commit(0, len(part))
    return torch.cat(logits[1:], 1)[0]


def verify(report: "Report") -> None:
    """Compare self-speculative with autoregressive decoding, for the embedded model and a larger random one."""
    import torch
    from models import load_prompts
    from synthetic import make_synthetic

    import layerskip

    torch.backends.cuda.matmul.allow_tf32 = False
    shape, exit_layer = ("tiny", 2) if report.small else ("240m", 4)
    prompts_file = Path(__file__).with_name("prompts.jsonl")
    number, new = (2, 24) if report.small else (8, 96)
    with TemporaryDirectory() as folder:
        make_synthetic(Path(folder), shape, exit_layer=exit_layer, agreement=0.9, device=report.device)
        for name, source, settings in (
            ("demo", "demo", [(2, 2), (4, 4)] if report.small else [(2, 4), (4, 4), (4, 8), (8, 4)]),
            (shape, folder, [(exit_layer, 4)] if report.small else [(exit_layer, 3), (exit_layer, 6)]),
        ):
            for dtype in ("float32", "bfloat16"):
                lm = layerskip.load(source, dtype=dtype, device=report.device, compile="auto")  # type: ignore[arg-type]
                prompts = load_prompts(lm, prompts_file, number)
                for batch_size in (2,) if report.small else (1, 4):
                    _verify(report, f"{name}, {dtype}, batch {batch_size}", lm, prompts, settings, batch_size, new)
    totals = [figures for figures in report.found.values() if isinstance(figures, dict)]
    errors, ties, texts = (sum(figures[key] for figures in totals) for key in ("errors", "near_ties", "texts"))
    report.keep(headline=f"{texts} texts: {errors} errors, {ties} near-ties")


def _verify(
    report: "Report",
    name: str,
    lm: Any,
    prompts: list[list[int]],
    settings: list[tuple[int, int]],
    batch_size: int,
    max_new_tokens: int,
) -> None:
    from layerskip import GenerationConfig
    from layerskip.evaluation.verify.compare import make_plan
    from layerskip.evaluation.verify.run import verify
    from layerskip.model.decoders.graphs import GraphDecoder

    config = GenerationConfig(temperature=0.8, top_p=0.95, seed=1, max_new_tokens=max_new_tokens, ignore_eos=True)
    started = time.perf_counter()
    verified = verify(lm, prompts, make_plan(lm, settings, config=config, batch_size=batch_size))
    made = lm.decoder.compiled if isinstance(lm.decoder, GraphDecoder) else ()
    divergences = [d for setting in verified.settings for d in setting.divergences]
    report.keep(
        **{
            name: {
                "texts": len(verified.settings) * len(prompts),
                "errors": verified.errors,
                "near_ties": sum(setting.near_ties for setting in verified.settings),
                "largest_gap": max((d.gap for d in divergences if d.gap is not None), default=None),
                "tolerance": verified.tolerance,
                "accepted": sum(s.accepted for s in verified.settings)
                / max(1, sum(s.drafted for s in verified.settings)),
                "captured": len(made),
                "seconds": round(time.perf_counter() - started, 2),
            }
        }
    )
    report.check(verified.errors == 0, f"{name}: {verified.errors} texts differ")
    for capture in made:
        report.check(capture.problem is None, f"{name}: capture failed: {capture.problem}")
    report.check(report.small or bool(made), f"{name}: nothing was captured")


def engine(report: "Report") -> None:
    """Run `engine.py`."""
    import engine as benchmark
    from rich.console import Console

    headlines = []
    for shape in ("tiny",) if report.small else ("240m", "1b"):
        arguments = benchmark.Arguments(
            model=shape,
            device=report.device,
            dtype="bfloat16",
            num_speculations=(2, 4) if report.small else (2, 4, 6),
            max_new_tokens=24 if report.small else 128,
            num_prompts=2,
            repetitions=1 if report.small else 3,
            adaptive=True,
        )
        content = benchmark.run(arguments, Console(width=110))
        report.keep(**{shape: content})
        plain = content["autoregressive"]
        best = max(content["rounds"], key=lambda round_: round_["speedup"])
        headlines.append(
            f"{shape}: {median(plain['tokens_per_second']):.0f} tokens/s, {plain['of_roofline']:.0%} of the bandwidth, "
            f"{best['speedup']:.2f}x by {best['num_speculations']} drafts, "
            f"{content['adaptive']['speedup']:.2f}x adaptive"
        )
        report.keep(headline="; ".join(headlines))
        for capture in content.get("captured", ()):
            report.check(capture["problem"] is None, f"{shape}: capture failed: {capture['problem']}")


def training(report: "Report") -> None:
    """`layerskip.train` from scratch on the checkout's own code; the time of a few steps decides how many fit into a
    minute."""
    import torch

    import layerskip
    from layerskip.evaluation.verify.compare import make_plan
    from layerskip.evaluation.verify.run import verify

    with TemporaryDirectory() as scratch:
        warm_up = 3 if report.small else 10
        speed = _train(report, Path(scratch) / "short", warm_up)["tokens_per_second"]
        seconds = min(6.0 if report.small else 60.0, max(1.0, report.left_s - (15 if report.small else 25)))
        steps = max(2 * warm_up, int(seconds * speed / _tokens_a_step(report)))
        steps = min(steps, 24) if report.small else steps
        if not report.small:
            torch.cuda.reset_peak_memory_stats()
        figures = _train(report, Path(scratch) / "long", steps)
        report.keep(**figures, steps=steps, peak_memory_gib=_peak_memory(report))
        report.check(
            figures["last_loss"] < figures["first_loss"] - LOSS_FALL,
            f"the loss went from {figures['first_loss']:.2f} to {figures['last_loss']:.2f}",
        )
        report.keep(
            headline=f"{figures['tokens_per_second']:.0f} tokens/s, {report.found['peak_memory_gib']:.2f} GiB, "
            f"loss {figures['first_loss']:.2f} to {figures['last_loss']:.2f}"
        )
        lm = layerskip.load(str(Path(scratch) / "long"), device=report.device)
        verified = verify(lm, [[5, 6, 7], [8, 9]], make_plan(lm, [(1, 3)], batch_size=2))
        report.check(verified.errors == 0, "the trained model's speculative text isn't its plain one")


def _tokens_a_step(report: "Report") -> int:
    return 8 * 128 if report.small else 32 * 512


def _train(report: "Report", output: Path, steps: int) -> dict[str, float]:
    from layerskip import DataConfig, LayerSkipConfig, OptimizationConfig, StartConfig, TrainingConfig, train
    from layerskip.training.config import CheckpointConfig

    length = 128 if report.small else 512
    shape = output.with_name("config.json")
    width, layers = (64, 4) if report.small else (768, 12)
    heads = width // 64
    sizes = {"hidden_size": width, "intermediate_size": 8 * width // 3, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 2048}
    shape.write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 1024, **sizes}))
    config = TrainingConfig(
        start=StartConfig(config=str(shape), tokenizer=str(ROOT / "src" / "layerskip" / "assets" / "demo")),
        data=DataConfig(data=(str(ROOT / "src"),), suffixes=("py",), sequence_length=length, held_out=0.02),
        recipe=LayerSkipConfig(dropout_max=0.1, rotation=2),
        optimization=OptimizationConfig(
            max_steps=steps,
            batch_size=_tokens_a_step(report) // length,
            learning_rate=1e-2 if report.small else 6e-4,
            precision="bfloat16",
        ),
        checkpoints=CheckpointConfig(save_steps=10**6, eval_steps=10**6, log_steps=1),
    )
    speeds = [0.0]
    result = train(config, output, on_step=lambda step: speeds.append(step.tokens_per_second), on_message=print)
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    few = max(1, len(losses) // 10)
    print(f"{steps} steps in {result.seconds:.1f} s", flush=True)
    return {
        "tokens_per_second": speeds[-1],
        "first_loss": losses[0],
        "last_loss": sum(losses[-few:]) / few,
        "held_out_loss": result.loss or 0.0,
        "seconds": result.seconds,
    }


def _peak_memory(report: "Report") -> float:
    """GiB of the GPU's tensors, or of this process, at their peak."""
    import torch

    if report.small:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return torch.cuda.max_memory_allocated() / 2**30
