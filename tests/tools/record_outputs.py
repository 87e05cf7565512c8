"""Records the tokens that a grid of settings generates, and compares two records: for changes that move code.

    python tests/tools/record_outputs.py before.json              # in the checkout before the change
    python tests/tools/record_outputs.py after.json --against before.json

Only outputs that depend on nothing but the settings are recorded. The tokens of adaptive decoding with rejection
sampling depend on measured times, so they are left out.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch

import layerskip
from layerskip.decoding.config import GenerationConfig, Strategy

PROMPTS = [
    "def add(a, b):",
    "Once upon a time",
    'import json\n\n\ndef read(path):\n    """Read a file."""\n    with open(path) as file:\n',
    "x = 1\ny = 2\nx = 1\ny = 2\nx = 1\n",
]
MODELS: dict[str, dict[str, Any]] = {
    "demo": {"name": "demo"},
    "demo torch": {"name": "demo", "kernels": "torch"},
    "demo int8 draft": {"name": "demo", "quantize_draft": "int8"},
    "demo 500 draft tokens": {"name": "demo", "draft_vocabulary": 500},
    "smollm2": {"name": "smollm2"},
    "smollm2 torch": {"name": "smollm2", "kernels": "torch"},
}
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "coupled": {"temperature": 0.8, "top_p": 0.9, "seed": 11},
    "coupled top-k": {"temperature": 1.2, "top_k": 40, "seed": 12},
    "coupled min-p": {"do_sample": True, "min_p": 0.05, "seed": 13},
    "rejection": {"temperature": 0.8, "top_p": 0.95, "seed": 14, "acceptance": "rejection"},
    "rejection one by one": {"do_sample": True, "seed": 15, "acceptance": "rejection", "block_verification": False},
    "repetition penalty": {"repetition_penalty": 1.3},
    "no repeated 3-gram, sampled": {"no_repeat_ngram_size": 3, "do_sample": True, "top_k": 20, "seed": 16},
}


def strategies(num_layers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and options of the ways to decode."""
    yield "adaptive", {}
    yield "autoregressive", {"generation_strategy": "autoregressive"}
    early = "early_exit" if "early_exit" in get_args(Strategy) else "autoregressive"
    yield "early exit", {"generation_strategy": early, "exit_layer": max(1, num_layers // 2)}
    for exit_layer in sorted({1, num_layers // 4, num_layers // 2, num_layers}):
        for length in (1, 4, 7):
            yield f"exit {exit_layer}, {length} drafts", {"exit_layer": exit_layer, "num_speculations": length}
    yield "ngram", {"generation_strategy": "ngram", "num_speculations": 5}


def settings(model: str, lm: layerskip.LanguageModel) -> Iterator[tuple[str, list[str], dict[str, Any]]]:
    """Keys, prompts and options of everything that is generated with a model."""
    small = model.startswith("smollm2")
    for way, options in strategies(lm.decoder.num_layers):
        for kind, sampling in SAMPLING.items():
            if way == "adaptive" and kind.startswith("rejection"):
                continue
            if small and ("torch" in model or kind not in ("greedy", "coupled", "rejection")) and "4 drafts" not in way:
                continue
            length = 24 if small else 48
            for batch in [PROMPTS[:1]] if small else [PROMPTS[:1], PROMPTS]:
                yield (
                    f"{model} | {way} | {kind} | {len(batch)}",
                    batch,
                    {
                        **options,
                        **sampling,
                        "max_new_tokens": length,
                    },
                )
    yield f"{model} | one token", PROMPTS, {"max_new_tokens": 1}
    yield f"{model} | stop", PROMPTS, {"stop": ("return", "\n\n"), "max_new_tokens": 32, "num_speculations": 6}
    yield f"{model} | past the end", PROMPTS, {"ignore_eos": True, "max_new_tokens": 40, "exit_layer": 1}


def record(names: list[str]) -> dict[str, Any]:
    """Token ids, finish reasons and texts by setting."""
    found: dict[str, Any] = {}
    for model in names:
        started = time.monotonic()
        lm = layerskip.load(**MODELS[model])
        for key, prompts, options in settings(model, lm):
            config = GenerationConfig(**options)
            results = lm.generate(prompts, config)
            found[key] = [[r.token_ids, r.finish_reason, r.text] for r in results]
        found |= {f"{model} | {key}": value for key, value in conversation(lm)}
        scores = lm.score(PROMPTS)
        found[f"{model} | scores"] = [round(score.logprob, 4) for score in scores]
        print(f"{model}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    return found


def conversation(lm: layerskip.LanguageModel) -> Iterator[tuple[str, Any]]:
    """A text that grows in a session, shrinks, and goes on."""
    session = lm.new_session()
    tokens: list[int] = []
    (first,) = lm.encode(PROMPTS[:1])
    tokens += first
    for turn, options in enumerate(({}, {"do_sample": True, "seed": 3}, {"num_speculations": 3}, {"exit_layer": 2})):
        stream = lm.stream([tokens], session=session, max_new_tokens=24, ignore_eos=True, **options)
        ids = [event.token_id for event in stream if type(event).__name__ == "TokenEvent"]
        yield f"session turn {turn}", ids
        tokens = [*tokens, *ids][: len(tokens) + len(ids) - 3 * turn] + first


def main() -> int:
    """Record, and compare if asked to; the exit status is 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="file to write")
    parser.add_argument("--against", type=Path, help="an earlier record")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    args = parser.parse_args()
    torch.set_num_threads(1)  # beside other work, threads that wait for one another make it ten times as slow
    torch.manual_seed(0)
    found = json.loads(json.dumps(record(args.models)))
    args.record.write_text(json.dumps(found))
    if args.against is None:
        print(f"{len(found)} settings recorded")
        return 0
    before = json.loads(args.against.read_text())
    different = [key for key in found if found[key] != before.get(key)]
    for key in different:
        print(f"differs: {key}")
    print(f"{len(found) - len(different)} of {len(found)} settings are identical")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
