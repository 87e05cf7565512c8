"""Compares a real model's greedy text with transformers' for the same weights, and with and without speculation.

    python benchmarks/real_models.py --models smollm2 gemma3-270m
    python benchmarks/real_models.py --models FILE.gguf --prompts human_eval.jsonl --num-prompts 20

For each model: greedy texts against transformers' with the same dequantized float32 weights, each difference examined
as in `layerskip verify`; the largest difference of logits along these texts; then `verify` itself at three exit layers,
greedy and coupled.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from models import load_prompts
from record import environment, write_record
from rich.console import Console

import layerskip
from layerskip.checkpoint.transformers_model import load_transformers_model
from layerskip.decoding.config import GenerationConfig
from layerskip.evaluation.verify.compare import VerifyReport, compare, make_plan
from layerskip.evaluation.verify.run import verify

TOLERANCE = 1e-3
"""Logits by which a near-tie in float32 may differ."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark."""

    models: tuple[str, ...] = ("smollm2",)
    """Names, GGUF files, folders or hub ids."""
    prompts: Path = Path(__file__).parent / "prompts.jsonl"
    """JSON lines with a field `prompt`."""
    num_prompts: int = 20
    max_new_tokens: int = 64
    drafts: tuple[int, ...] = (1, 4)
    """Draft lengths of `verify`."""
    verify_prompts: int = 6
    threads: int = 2


def main(arguments: Arguments) -> None:
    """Compare, print and record."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    console, results = Console(), {}
    for name in arguments.models:
        lm = layerskip.load(name, dtype="float32", device="cpu")
        prompts = load_prompts(lm, arguments.prompts, arguments.num_prompts)
        parity = compare_with_transformers(lm, prompts, arguments.max_new_tokens)
        num_layers = lm.decoder.num_layers
        exits = (max(1, num_layers // 4), num_layers // 2, num_layers - 1)
        plan = make_plan(
            lm,
            [(exit_layer, drafts) for exit_layer in exits for drafts in arguments.drafts],
            config=GenerationConfig(max_new_tokens=arguments.max_new_tokens, temperature=0.8, top_p=0.95),
        )
        verified = verify(lm, prompts[: arguments.verify_prompts], plan)
        results[name] = {**parity, "verify": summary(verified)}
        console.print(f"[bold]{name}[/bold] ({lm.decoder.kernels} kernels, {lm.checkpoint.contents.format})")
        for key, value in results[name].items():
            console.print(f"    {key}: {value}")
    content = {"arguments": json.loads(json.dumps(asdict(arguments), default=str)), "results": results}
    console.print(f"{environment()['cpu']}; record: {write_record('real_models', content)}")


def compare_with_transformers(
    lm: layerskip.LanguageModel, prompts: list[list[int]], max_new_tokens: int
) -> dict[str, Any]:
    """Numbers of texts that are equal, differ first at a near-tie, or are wrong; and the largest difference of
    logits."""
    reference = load_transformers_model(lm.checkpoint, torch.float32).eval()
    config = GenerationConfig(
        generation_strategy="autoregressive", max_new_tokens=max_new_tokens, do_sample=False, ignore_eos=True, seed=0
    )
    counts = {"equal": 0, "near_ties": 0, "errors": 0}
    difference = 0.0
    for index, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            theirs = out[0, len(prompt) :].tolist()
            logits = reference(out).logits[0]
        difference = max(difference, (logits - lm.logits(out[0].tolist())).abs().max().item())
        ours = lm.generate([prompt], config)[0].token_ids
        found = compare(lm, config, index, prompt, theirs, ours, TOLERANCE)
        counts["equal" if found is None else "near_ties" if found.near_tie else "errors"] += 1
    return {"greedy_texts": counts, "largest_difference_of_logits": difference}


def summary(report: VerifyReport) -> dict[str, int]:
    """Counts over all settings."""
    return {
        "texts": sum(s.equal + s.near_ties + s.errors for s in report.settings),
        "near_ties": sum(s.near_ties for s in report.settings),
        "errors": report.errors,
    }


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
