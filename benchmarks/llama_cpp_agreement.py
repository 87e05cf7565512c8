"""Whether llama.cpp gets the same model from exported GGUF files: tokens, greedy texts, dequantized numbers.

    pip install llama-cpp-python
    python benchmarks/llama_cpp_agreement.py --model demo
    python benchmarks/llama_cpp_agreement.py --model smollm2 --exit-layer 4 --json

The model and its first layers are exported in float32. llama.cpp must read the same tokens in all texts, and its
greedy texts must equal ours: for the model autoregressive decoding's, for the first layers early exit's, both from the
original files. Where a text diverges, the gap between our two highest logits is reported, with the common text as
input: it must be below `--near-tie`. Then Q8_0 and Q4_0 files are written; ggml's own functions and our reader must get
the same numbers from them, bit for bit. The exit code is 1 if anything differs.
"""

import ctypes
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
import tyro
from llama_cpp_model import LlamaCpp
from models import ModelName
from record import environment, write_record
from rich.console import Console
from rich.table import Table

import layerskip
from layerskip.checkpoint.checkpoint import Checkpoint
from layerskip.checkpoint.gguf.container import TensorEntry, read_container
from layerskip.checkpoint.gguf.tensors import read_tensor
from layerskip.export.gguf.write import export_gguf

HERE = Path(__file__).parent
QUANTIZED = ("q8_0", "q4_0")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the comparison."""

    model: ModelName = "demo"
    exit_layer: int = 4
    """Layers of the draft model."""
    num_prompts: int = 20
    max_new_tokens: int = 48
    near_tie: float = 1e-4
    """Largest gap between our two highest logits at which another choice counts as a near-tie."""
    threads: int = 2
    json: bool = False
    """Print the record, and nothing else."""


def main(arguments: Arguments) -> None:
    """Compare, print and record."""
    torch.set_num_threads(arguments.threads)
    lm = layerskip.load(arguments.model, dtype="float32", device="cpu", exit_adapters=None)
    with tempfile.TemporaryDirectory() as scratch:
        whole = compare_texts(arguments, lm, None, Path(scratch) / "main.gguf")
        draft = compare_texts(arguments, lm, arguments.exit_layer, Path(scratch) / "draft.gguf")
        numbers = [
            compare_numbers(lm.checkpoint, name, Path(scratch) / f"{name}.gguf", arguments) for name in QUANTIZED
        ]
    content = {
        "arguments": json.loads(json.dumps(asdict(arguments), default=str)),
        "llama_cpp_python": llama_cpp.__version__,
        "main": whole,
        "draft": draft,
        "quantized": numbers,
    }
    agrees = all(
        part["other_tokens"] == [] and all(each["is_near_tie"] for each in part["divergences"])
        for part in (whole, draft)
    ) and all(each["other_tensors"] == [] for each in numbers)
    content["agrees"] = agrees
    path = write_record(f"llama_cpp_agreement-{Path(arguments.model).name}", content)
    if arguments.json:
        print(json.dumps({"environment": environment(), **content}, indent=2))
    else:
        report(arguments, content, path)
    sys.exit(0 if agrees else 1)


def compare_texts(
    arguments: Arguments, lm: layerskip.LanguageModel, exit_layer: int | None, file: Path
) -> dict[str, Any]:
    """Export in float32, and compare tokens of texts and greedy continuations."""
    exported = export_gguf(lm.checkpoint, file, exit_layer=exit_layer, type_name="f32")
    theirs = LlamaCpp(file, 2048, arguments.threads, exact=True)
    texts = [text for group in json.loads((HERE / "tokenizer_texts.json").read_text()).values() for text in group]
    prompts = [json.loads(line)["prompt"] for line in (HERE / "prompts.jsonl").read_text("utf-8").splitlines()]
    prompts = [prompt.rstrip() for prompt in prompts]
    prompts = [*prompts, *(text for text in texts if 40 < len(text) < 400)][: arguments.num_prompts]
    texts = [*texts, *prompts]
    others = [text for text in texts if theirs.encode(text) != lm.text_tokenizer.encode(text)]
    same, divergences = 0, []
    options: dict[str, Any] = {"generation_strategy": "autoregressive"}
    if exit_layer is not None:
        options = {"generation_strategy": "early_exit", "exit_layer": exit_layer}
    short = layerskip.load(str(file), dtype="float32", device="cpu")
    for prompt in prompts:
        tokens = lm.encode([prompt])[0]
        ours = lm.generate(
            [tokens], max_new_tokens=arguments.max_new_tokens, do_sample=False, ignore_eos=True, **options
        )[0].token_ids
        written, _ = theirs.write(tokens, arguments.max_new_tokens)
        if ours == written:
            same += 1
            continue
        place = next(i for i, pair in enumerate(zip(ours, written, strict=True)) if pair[0] != pair[1])
        logits = short.logits([*tokens, *ours[:place]])[-1]
        gap = float(logits[ours[place]] - logits[written[place]])
        divergences.append(
            {"prompt": prompt[:60], "token": place, "gap": gap, "is_near_tie": abs(gap) < arguments.near_tie}
        )
    theirs.close()
    return {
        "layers": exported.exit_layer,
        "bytes": exported.num_bytes,
        "texts": len(texts),
        "other_tokens": others,
        "prompts": len(prompts),
        "same_texts": same,
        "divergences": divergences,
    }


def compare_numbers(checkpoint: Checkpoint, name: str, file: Path, arguments: Arguments) -> dict[str, Any]:
    """Export quantized, load it with both, and dequantize every tensor with ggml's functions and with ours."""
    exported = export_gguf(checkpoint, file, type_name=name)
    LlamaCpp(file, 256, arguments.threads).close()
    layerskip.load(str(file), device="cpu").generate("a", max_new_tokens=2)
    entries = [entry for entry in read_container(file).tensors.values() if entry.type.name.startswith("Q")]
    others = [entry.name for entry in entries if not torch.equal(read_tensor(entry), dequantize_by_ggml(entry))]
    return {
        "type": name,
        "bytes": exported.num_bytes,
        "types": exported.types,
        "compared_tensors": len(entries),
        "other_tensors": others,
    }


def dequantize_by_ggml(entry: TensorEntry) -> torch.Tensor:
    """A tensor's numbers by the function that llama.cpp has for them."""
    function = getattr(ggml(), f"dequantize_row_{entry.type.name.lower()}")
    data = entry.path.read_bytes()[entry.offset : entry.offset + entry.num_bytes]
    numbers = np.empty(entry.shape, dtype=np.float32)
    function(data, numbers.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(numbers.size))
    return torch.from_numpy(numbers)


def ggml() -> ctypes.CDLL:
    """The library that llama.cpp's package loads."""
    return ctypes.CDLL(str(next(libraries())))


def libraries() -> Iterator[Path]:
    """Where that library may be."""
    folder = Path(llama_cpp.__file__).parent / "lib"
    yield from sorted(folder.glob("*ggml-base.*"))


def report(arguments: Arguments, content: dict[str, Any], path: Path) -> None:
    """Print tables."""
    console = Console()
    table = Table("file", "layers", "MB", "same tokens", "same greedy texts", "divergences (gap of our logits)")
    for name in ("main", "draft"):
        part = content[name]
        gaps = ", ".join(f"{each['gap']:.1e}" for each in part["divergences"]) or "none"
        tokens = f"{part['texts'] - len(part['other_tokens'])} of {part['texts']}"
        texts = f"{part['same_texts']} of {part['prompts']}"
        table.add_row(name, str(part["layers"]), f"{part['bytes'] / 1e6:.1f}", tokens, texts, gaps)
    console.print(table)
    table = Table("type", "MB", "tensors", "same numbers")
    for part in content["quantized"]:
        same = part["compared_tensors"] - len(part["other_tensors"])
        table.add_row(part["type"], f"{part['bytes'] / 1e6:.1f}", str(part["compared_tensors"]), str(same))
    console.print(table)
    for text in [text for name in ("main", "draft") for text in content[name]["other_tokens"]][:5]:
        console.print(f"other tokens: {text!r}", markup=False)
    verdict = "they agree" if content["agrees"] else "they DIFFER"
    console.print(f"{verdict}; {environment()['cpu']}, {arguments.threads} threads; record: {path}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
