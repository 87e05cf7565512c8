"""Ranks of one machine that share a network: texts beside those of one process, weights, traffic and speed.

    python benchmarks/tensor_parallel.py --model smollm2 --ranks 2 4
    python benchmarks/tensor_parallel.py --model demo --ranks 2 --kernels torch --replicate-layers 0 4

Every way to decode writes after every prompt, greedily and with coupled sampling. A text that differs from one
process's is judged as `layerskip verify` does it: a near-tie or an error.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from typing import Any, Literal

import tyro
from record import environment, write_record
from rich.console import Console
from rich.table import Table

PROMPTS = (
    "def add(a, b):\n",
    "class Stack:\n",
    "import os\n\n",
    "The capital of France is",
    "Once upon a time, in a small village,",
    "for i in range(10):\n",
)
MODES: dict[str, dict[str, Any]] = {"greedy": {}, "coupled": {"temperature": 0.8, "top_p": 0.95, "seed": 1}}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark."""

    model: str = "smollm2"
    ranks: tuple[int, ...] = (2, 4)
    kernels: Literal["auto", "native", "torch"] = "auto"
    replicate_layers: tuple[int, ...] = (0,)
    """First layers that every rank has whole; each number is tried."""
    exit_layer: int = 2
    num_speculations: int = 3
    max_new_tokens: int = 32
    json: bool = False
    """Print the record, and nothing else."""
    place: tuple[str, int, int, int] | None = None
    """Folder where ranks meet, rank, number of ranks, layers that are whole: be one of them, and end."""


def ways(arguments: Arguments) -> dict[str, dict[str, Any]]:
    """Ways to decode, by name."""
    drafting = {"exit_layer": arguments.exit_layer, "num_speculations": arguments.num_speculations}
    name = f"exit {arguments.exit_layer}, {arguments.num_speculations} drafts"
    return {"plain": {"generation_strategy": "autoregressive"}, name: drafting, "adaptive": {}}


def main(arguments: Arguments) -> None:
    """Measure, print and record."""
    if arguments.place is not None:
        print(json.dumps(be_a_rank(arguments, *arguments.place)))
        return
    alone = run(arguments, 1, 0)[0]
    found = {}
    for num_ranks in arguments.ranks:
        for whole in arguments.replicate_layers:
            ranks = run(arguments, num_ranks, whole)
            assert all(rank["tokens"] == ranks[0]["tokens"] for rank in ranks), "ranks wrote different texts"
            name = f"{num_ranks} ranks" + (f", {whole} whole layers" if whole else "")
            found[name] = {
                **{key: ranks[0][key] for key in ("seconds", "num_tokens", "sum_bytes", "other_bytes")},
                "weight_bytes": [rank["weight_bytes"] for rank in ranks],
                "verdicts": judge(arguments, alone["tokens"], ranks[0]["tokens"]),
            }
    content = {"arguments": asdict(arguments), "machine": environment(), "one process": alone, "ranks": found}
    path = write_record("tensor_parallel", content)
    if arguments.json:
        print(json.dumps(content))
        return
    report(arguments, alone, found)
    print(path)


def run(arguments: Arguments, num_ranks: int, whole: int) -> list[dict[str, Any]]:
    """The figures of each rank."""
    with tempfile.TemporaryDirectory() as folder:
        kept = asdict(arguments)
        flags = [
            part
            for name in ("model", "kernels", "exit_layer", "num_speculations", "max_new_tokens")
            for part in (f"--{name.replace('_', '-')}", str(kept[name]))
        ]
        variables = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "LAYERSKIP_CACHE": folder}
        variables["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // num_ranks))
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, *flags, "--place", folder, str(rank), str(num_ranks), str(whole)],
                env=variables,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(num_ranks)
        ]
        outputs = [process.communicate()[0] for process in processes]
        if any(process.returncode for process in processes):
            raise SystemExit(f"a process of {num_ranks} failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def be_a_rank(arguments: Arguments, folder: str, rank: int, num_ranks: int, whole: int) -> dict[str, Any]:
    """Generate everything, as one of the ranks or alone."""
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import FileStore

    import layerskip

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if num_ranks > 1:
        store = FileStore(f"{folder}/store", num_ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    options = {"dtype": "float32", "device": "cpu", "kernels": arguments.kernels}
    lm = layerskip.load(arguments.model, tensor_parallel=num_ranks, replicate_layers=whole, **options)  # type: ignore[arg-type]
    figures: dict[str, Any] = {"tokens": {}, "seconds": {}, "num_tokens": {}, "sum_bytes": {}, "other_bytes": {}}
    group = getattr(lm.decoder, "group", None)
    for mode, sampling in MODES.items():
        for way, drafting in ways(arguments).items():
            lm.generate([PROMPTS[0]], max_new_tokens=4, **sampling, **drafting)  # warm
            before = (group.sums.num_bytes, group.others.num_bytes) if group else (0, 0)
            results = [
                lm.generate([prompt], max_new_tokens=arguments.max_new_tokens, ignore_eos=True, **sampling, **drafting)[
                    0
                ]
                for prompt in PROMPTS
            ]
            key = f"{mode}, {way}"
            figures["tokens"][key] = [result.token_ids for result in results]
            figures["seconds"][key] = sum(result.stats.seconds for result in results)
            figures["num_tokens"][key] = sum(len(result.token_ids) for result in results)
            after = (group.sums.num_bytes, group.others.num_bytes) if group else (0, 0)
            figures["sum_bytes"][key], figures["other_bytes"][key] = (b - a for a, b in zip(before, after, strict=True))
    network = lm.decoder._network
    linears = {id(network.head): network.head}  # a matrix that several layers have counts once
    for layer in network.layers[: lm.decoder.num_layers]:
        for linear in (layer.qkv, layer.o, *(part for pair in layer.gated for part in pair)):  # type: ignore[attr-defined]
            linears[id(linear)] = linear
    figures["weight_bytes"] = sum(linear.num_bytes for linear in linears.values())
    if group is not None:
        group.watch.stop()
        dist.destroy_process_group()
    return figures


def judge(arguments: Arguments, alone: dict[str, Any], together: dict[str, Any]) -> dict[str, int]:
    """How many texts are equal, near-ties and errors."""
    import torch

    import layerskip
    from layerskip.decoding.config import make_config
    from layerskip.evaluation.verify.compare import LOGIT_TOLERANCE, compare

    lm = layerskip.load(arguments.model, dtype="float32", device="cpu", exit_adapters=None)
    verdicts = {"equal": 0, "near-ties": 0, "errors": 0}
    for key, texts in together.items():
        mode, plain = key.split(",")[0], f"{key.split(',')[0]}, plain"
        config = make_config(None, {"max_new_tokens": arguments.max_new_tokens, **MODES[mode]})
        for index, (prompt, text) in enumerate(zip(lm.encode(list(PROMPTS)), texts, strict=True)):
            divergence = compare(lm, config, index, prompt, alone[plain][index], text, LOGIT_TOLERANCE[torch.float32])
            kind = "equal" if divergence is None else "near-ties" if divergence.near_tie else "errors"
            verdicts[kind] += 1
    return verdicts


def report(arguments: Arguments, alone: dict[str, Any], found: dict[str, Any]) -> None:
    """Print a table."""
    table = Table(title=f"{arguments.model}, {arguments.kernels} kernels")
    for name in ("", "equal", "near-ties", "errors", "largest share of weights"):
        table.add_column(name, justify="left" if not name else "right")
    keys = list(alone["seconds"])
    for key in keys:
        table.add_column(f"{key}\ntokens/s", justify="right")
    table.add_column("bytes of sums\na plain token", justify="right")

    def speeds(figures: dict[str, Any]) -> list[str]:
        return [f"{figures['num_tokens'][key] / figures['seconds'][key]:.1f}" for key in keys]

    table.add_row("one process", "", "", "", "1.000", *speeds(alone), "")
    for name, figures in found.items():
        share = max(figures["weight_bytes"]) / alone["weight_bytes"]
        counts = [str(figures["verdicts"][kind]) for kind in ("equal", "near-ties", "errors")]
        per_token = figures["sum_bytes"]["greedy, plain"] / figures["num_tokens"]["greedy, plain"]
        table.add_row(name, *counts, f"{share:.3f}", *speeds(figures), f"{per_token:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
