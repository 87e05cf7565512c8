"""The limit of decoding on this machine: how fast memory is read, and the share of it that decoding reaches.

    python benchmarks/roofline.py --model 240m --formats file bf16 q8_0 q4_0 q4_1 q4_k_m --folder files
    python benchmarks/roofline.py --model 1b --formats bf16 q8_0 q4_k_m --folder files --compute float32 int8

A token of autoregressive decoding reads all weights once, and the keys and values of the tokens before it. Bytes read
in a second are compared with the fastest reading of memory within the same repetition: a plain search through 512 MB
by all threads (`memchr` of the C library), and products of one row with a weight of that size by each kernel.
`file` is the model as it is; the other formats are written by llama.cpp's quantizer, as in `vs_llama_cpp.py`.
"""

import ctypes
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from arguments import PromptArguments
from gguf_formats import Format, write_format
from models import LARGE, load_prompts, prepare
from peers import Spread, load_each
from record import environment, processor, write_record
from rich.console import Console
from rich.table import Table

import layerskip
from layerskip.checkpoint.loading.placement import check_compute
from layerskip.errors import InvalidArgumentError
from layerskip.model.native.library import load_library
from layerskip.model.native.linear import NativeLinear
from layerskip.model.torch.linear import OneDNNLinear, has_onednn, pack

INPUTS, OUTPUTS = 4096, 32_768
"""Width of a weight of 512 MB in float32, more than any cache holds."""
READ_BYTES = 512 << 20
REPETITIONS = 5
READING = "reading"
"""Name of the plain search through memory."""


class Roofline:
    """Products of one row with a large weight, by every kernel there is; a plain reading, or on CUDA a plain copy."""

    @torch.inference_mode()
    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        weight = torch.randn(OUTPUTS, INPUTS, device=device).to(dtype)
        x = torch.randn(1, INPUTS, device=device).to(dtype)
        self._bytes = weight.nbytes
        self._kernels: dict[str, Callable[[], object]] = {"torch": lambda: F.linear(x, weight)}
        if has_onednn(device, dtype):
            packed = OneDNNLinear(pack(weight))
            self._kernels["oneDNN, packed"] = lambda: packed(x)
        if device.type == "cpu" and dtype == torch.float32 and load_library() is not None:
            native = NativeLinear(weight)
            self._kernels["native"] = lambda: native(x)
        if device.type == "cpu":
            self._kernels[READING] = Reader(torch.get_num_threads())
        if device.type == "cuda":
            target = torch.empty_like(weight)
            self._kernels["copy"] = lambda: target.copy_(weight)

    @torch.inference_mode()
    def gigabytes_per_second(self) -> dict[str, float]:
        """GB that each kernel reads in a second (a copy also writes them, and both count)."""
        return {name: self._moved(name) / self._seconds(kernel) / 1e9 for name, kernel in self._kernels.items()}

    def _moved(self, name: str) -> int:
        """Bytes that a kernel moves."""
        return READ_BYTES if name == READING else (2 if name == "copy" else 1) * self._bytes

    def _seconds(self, call: Callable[[], object]) -> float:
        times = []
        for _ in range(REPETITIONS):
            self._wait()
            start = time.perf_counter()
            call()
            self._wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class Reader:
    """A search for a byte that isn't there, each thread in its own part of the memory."""

    def __init__(self, threads: int) -> None:
        self._memory = torch.ones(READ_BYTES, dtype=torch.uint8)  # written, so that it is memory of its own
        self._part = READ_BYTES // threads
        self._threads = ThreadPoolExecutor(threads)
        self._places = [self._memory.data_ptr() + i * self._part for i in range(threads)]
        self._search = ctypes.CDLL(None).memchr  # ctypes lets go of Python's lock meanwhile
        self._search.argtypes, self._search.restype = (
            (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t),
            ctypes.c_void_p,
        )

    def __call__(self) -> None:
        found = list(self._threads.map(self._read, self._places))
        if any(place is not None for place in found):
            raise RuntimeError("memory that is all ones has a zero")

    def _read(self, place: int) -> object:
        return self._search(place, 0, self._part)


@dataclass(frozen=True, kw_only=True)
class Arguments(PromptArguments):
    """Options of the benchmark."""

    model: str = "240m"
    formats: tuple[Format, ...] = ("file", "bf16", "q8_0", "q4_0", "q4_1", "q4_k_m")
    """`file`: the model as it is; others are written by llama.cpp's quantizer."""
    compute: tuple[str, ...] = ("float32",)
    """How our products are computed: values of the option of `layerskip.load`. One that a format doesn't allow is
    left out there."""
    load: dict[str, str] = field(default_factory=dict)
    """Further options of `layerskip.load` as pairs, such as `quantize int4`."""
    num_prompts: int = 2
    folder: Path | None = None
    """Where the files are kept; a temporary folder if not given."""
    json: bool = False
    """Print the record, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What decoding reads, and the share of what the machine can read."""

    bytes_a_token: float
    tokens_per_second: Spread
    gigabytes_per_second: Spread
    share: Spread
    """Of the fastest reading in the same repetition."""


def main(arguments: Arguments) -> None:
    """Measure, print and record."""
    for compute in arguments.compute:
        check_compute(compute, native=True)
    torch.set_num_threads(arguments.threads)
    console = Console(quiet=arguments.json, width=120)
    roofline = Roofline(torch.device("cpu"), torch.float32)
    measured: list[dict[str, float]] = []
    found: dict[str, Usage] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.folder or Path(scratch)) / Path(arguments.model).stem
        dtype = torch.bfloat16 if arguments.model in LARGE else torch.float32
        model = prepare(arguments.model, folder / "exit4", exit_layer=4, dtype=dtype)
        for name in arguments.formats:
            source = model if name == "file" else str(write_format(model, name, folder, arguments.threads))
            for compute, lm in load_each(source, arguments.compute, arguments.load, console):
                found[f"{name}, {compute}"] = measure(arguments, lm, roofline, measured)
    report(arguments, console, measured, found)


def measure(
    arguments: Arguments, lm: layerskip.LanguageModel, roofline: Roofline, measured: list[dict[str, float]]
) -> Usage:
    """Decode and read memory in turn; readings are appended to `measured`."""
    prompts = load_prompts(lm, arguments.prompts, arguments.num_prompts)
    context = sum(map(len, prompts)) / len(prompts) + arguments.max_new_tokens / 2
    bytes_ = lm.decoder.weight_bytes(0, lm.config.num_layers) + context * lm.decoder.token_bytes
    rates, shares = [], []
    for repetition in range(arguments.repetitions + 1):
        before = roofline.gigabytes_per_second()
        rate = tokens_per_second(arguments, lm, prompts)
        if repetition:  # the first warms up
            measured.append(before)
            rates.append(rate)
            shares.append(rate * bytes_ / 1e9 / max(before.values()))
    return Usage(
        bytes_a_token=bytes_,
        tokens_per_second=Spread.of(rates),
        gigabytes_per_second=Spread.of([rate * bytes_ / 1e9 for rate in rates]),
        share=Spread.of(shares),
    )


def tokens_per_second(arguments: Arguments, lm: layerskip.LanguageModel, prompts: list[list[int]]) -> float:
    """Of autoregressive decoding, without the prompts."""
    options = {"generation_strategy": "autoregressive", "do_sample": False, "ignore_eos": True}
    results = [lm.generate([prompt], max_new_tokens=arguments.max_new_tokens, **options)[0] for prompt in prompts]
    seconds = sum(result.stats.seconds - result.stats.time_to_first_token_s for result in results)
    return sum(result.stats.tokens - 1 for result in results) / seconds


def report(arguments: Arguments, console: Console, measured: list[dict[str, float]], found: dict[str, Usage]) -> None:
    """Print the readings and a table, and write the record."""
    if not found:
        raise InvalidArgumentError(f"no format can be computed in {', '.join(arguments.compute)}")
    reading = {name: Spread.of([each[name] for each in measured]) for name in measured[0]}
    speeds = ", ".join(f"{name} {each.median:.1f} GB/s (up to {each.high:.1f})" for name, each in reading.items())
    console.print(f"{processor()}, {arguments.threads} threads; {speeds}", markup=False)
    table = Table("weights", "MB a token", "tokens/s", "min - max", "GB/s", "of the reading", "min - max")
    table.title = f"{arguments.model}, autoregressive"
    for name, usage in found.items():
        rate = f"{usage.gigabytes_per_second.median:.1f}"
        table.add_row(
            name,
            f"{usage.bytes_a_token / 1e6:.1f}",
            *usage.tokens_per_second.format(1),
            rate,
            *usage.share.format(2),
        )
    console.print(table)
    content = {
        "arguments": json.loads(json.dumps(asdict(arguments), default=str)),
        "reading_gb_per_second": {name: asdict(each) for name, each in reading.items()},
        "decoding": {name: asdict(usage) for name, usage in found.items()},
    }
    path = write_record(f"roofline-{Path(arguments.model).name}", content)
    if arguments.json:
        print(json.dumps({"environment": environment(), **content}, indent=2))
    console.print(f"record: {path}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Arguments, description=__doc__))
