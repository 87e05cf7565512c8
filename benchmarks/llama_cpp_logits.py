"""Why texts of llama.cpp and ours differ: logits after every token of the same text, setting by setting.

    python benchmarks/llama_cpp_logits.py --model smollm2 --folder files
    python benchmarks/llama_cpp_logits.py --model gemma3-270m --formats f32 file --folder files

For each file, llama.cpp reads the text with its defaults (keys and values in float16, fused attention), then with keys
and values in float32, also without fused attention; each time all at once, and token by token. Ours does so in each
`--compute`. The reference is ours in float32: the table has the largest and the mean difference of logits from it, the
mean Kullback-Leibler divergence of the distributions in nats, the share of places with the same likeliest token, and
the first place where it differs. Rows `against itself` compare llama.cpp token by token with llama.cpp all at once.

With a float32 file, a float32 cache and no fused attention, what is left is the rounding of float32 sums: both run the
same network. With quantized files llama.cpp rounds activations to 8 bits. A difference in the last bit then decides
which way some numbers are rounded, so that its logits depend on how many tokens it reads at once.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import torch
import tyro
from gguf_formats import Format, write_format
from llama_cpp_model import LlamaCpp, describe_build
from models import ModelName, gguf_file, long_prompts
from peers import load_each
from record import environment, processor, write_record
from rich.console import Console
from rich.table import Table

import layerskip
from layerskip.checkpoint.loading.placement import check_compute
from layerskip.errors import InvalidArgumentError

Logits = npt.NDArray[np.float32]
"""[tokens, vocabulary]"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the comparison."""

    model: ModelName = "smollm2"
    formats: tuple[Format, ...] = ("f32", "q4_1", "q8_0")
    """What llama.cpp's quantizer makes of the weights; `file`: the model's GGUF file as it is."""
    compute: tuple[str, ...] = ("int8",)
    """How our products are computed besides float32: values of the option of `layerskip.load`."""
    tokens: int = 128
    """Length of the text."""
    prompts: Path = Path(__file__).parent / "prompts.jsonl"
    """JSON lines with a field `prompt`, of which the text is made."""
    folder: Path | None = None
    """Where the files are kept; a temporary folder if not given."""
    threads: int = 2
    json: bool = False
    """Print the record, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Of logits from the reference's."""

    largest: float
    mean: float
    divergence: float
    """Mean Kullback-Leibler divergence from the reference's distribution, in nats."""
    agreement: float
    """Share of places with the same likeliest token."""
    first: int | None
    """First place with another one; None if there is none."""

    @classmethod
    def of(cls, found: Logits, expected: Logits) -> "Difference":
        """Compare place by place."""
        gap = np.abs(found - expected)
        other = found.argmax(-1) != expected.argmax(-1)
        ours, theirs = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (expected, found))
        return cls(
            largest=float(gap.max()),
            mean=float(gap.mean()),
            divergence=float((ours.exp() * (ours - theirs)).sum(-1).mean()),
            agreement=float(1 - other.mean()),
            first=int(other.argmax()) if other.any() else None,
        )


def main(arguments: Arguments) -> None:
    """Compare, print and record."""
    for compute in arguments.compute:
        check_compute(compute, native=True)
    torch.set_num_threads(arguments.threads)
    console = Console(quiet=arguments.json, width=120)
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.folder or Path(scratch)) / Path(arguments.model).stem
        for name in arguments.formats:
            own = gguf_file(arguments.model) if name == "file" else None
            if name == "file" and own is None:
                raise InvalidArgumentError(f"{arguments.model} is not a GGUF file; leave out --formats file")
            file = own or write_format(arguments.model, name, folder, arguments.threads)
            found = dict(compare(arguments, console, file))
            show(console, f"{arguments.model}, {name}, {arguments.tokens} tokens", found)
            results[name] = {setting: asdict(difference) for setting, difference in found.items()}
    content = {
        "arguments": json.loads(json.dumps(asdict(arguments), default=str)),
        "build": describe_build(),
        "differences": results,
    }
    path = write_record(f"llama_cpp_logits-{Path(arguments.model).name}", content)
    if arguments.json:
        print(json.dumps({"environment": environment(), **content}, indent=2))
    console.print(f"{processor()}; record: {path}", markup=False, soft_wrap=True)


def compare(arguments: Arguments, console: Console, file: Path) -> Iterator[tuple[str, Difference]]:
    """llama.cpp in each setting, and ours in each way to compute, against ours in float32."""
    lm = layerskip.load(str(file), dtype="float32", device="cpu", exit_adapters=None)
    (tokens,) = long_prompts(lm, arguments.prompts, 1, arguments.tokens)
    expected = lm.logits(tokens).numpy()
    for compute, other in load_each(str(file), arguments.compute, {"exit_adapters": None}, console):
        yield f"ours, {compute}", Difference.of(other.logits(tokens).numpy(), expected)
    settings: dict[str, dict[str, Any]] = {
        "llama.cpp, defaults": {},
        "llama.cpp, float32 cache": {"cache_type": llama_cpp.GGML_TYPE_F32},
        "llama.cpp, exact attention": {"exact": True},
    }
    for name, options in settings.items():
        with closing(LlamaCpp(file, len(tokens) + 8, arguments.threads, **options)) as theirs:
            whole = theirs.logits(tokens, len(tokens))
            single = theirs.logits(tokens, 1)
        yield name, Difference.of(whole, expected)
        yield f"{name}, token by token", Difference.of(single, expected)
        yield f"{name}, against itself", Difference.of(single, whole)


def show(console: Console, title: str, found: dict[str, Difference]) -> None:
    """Print a table."""
    table = Table("setting", "largest", "mean", "divergence", "same token", "first other", title=title)
    for setting, each in found.items():
        figures = (f"{each.largest:.1e}", f"{each.mean:.1e}", f"{each.divergence:.1e}", f"{each.agreement:.1%}")
        table.add_row(setting, *figures, "none" if each.first is None else str(each.first))
    console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
