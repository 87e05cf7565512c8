"""Work that several processes do together, as the ranks of a process group on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HELPERS = Path(__file__).parent
SOURCES = HELPERS.parents[1] / "src"
BEGIN = """
import importlib, json, sys
import torch
torch.set_num_threads(1)
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore
folder, rank, size, work, argument = sys.argv[1:]
dist.init_process_group("gloo", store=FileStore(folder + "/store", int(size)), rank=int(rank), world_size=int(size))
module, _, name = work.partition(":")
result = getattr(importlib.import_module(module), name)(**json.loads(argument))
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump(result, file)
from layerskip.model.parallel.watch import process_watch
process_watch().stop()
dist.destroy_process_group()
"""


def start_ranks(folder: Path, num_ranks: int, work: str, **argument: Any) -> list[subprocess.Popen[str]]:
    """Start the processes.

    Args:
        folder: An empty folder of theirs.
        num_ranks: N.
        work: A function `module:name` of the helpers.
        **argument: Its arguments, which JSON can represent.
    """
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(SOURCES), str(HELPERS)]),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-c", BEGIN, str(folder), str(rank), str(num_ranks), work, json.dumps(argument)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]


def run_ranks(folder: Path, num_ranks: int, work: str, **argument: Any) -> list[Any]:
    """What the function returned in each rank; arguments are those of `start_ranks`."""
    processes = start_ranks(folder, num_ranks, work, **argument)
    reports = [process.communicate(timeout=300)[1] for process in processes]
    for rank, (process, report) in enumerate(zip(processes, reports, strict=True)):
        assert process.returncode == 0, f"rank {rank}: {report}"
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_ranks)]
