"""`layerskip info`: versions, processor and devices, the compiled kernels, threads, cache folders and memory."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field as default
from pathlib import Path
from typing import Any

from layerskip.cli.exit_code import ExitCode
from layerskip.cli.flags.arguments import OutputArguments, parse
from layerskip.cli.measuring.memory import size_text
from layerskip.cli.terminal.terminal import make_console
from layerskip.files import cache_folder, to_json


@dataclass(frozen=True, kw_only=True)
class InfoArguments:
    """Show what this installation has and what it uses on this machine.

    Versions, processor and devices, the compiled kernels for each instruction set and why each can or can't run,
    threads, cache folders and memory.

    Example: layerskip info --json
    """

    output: OutputArguments = default(default_factory=OutputArguments)


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    arguments = parse(InfoArguments, "info", argv)
    facts = gather()
    if arguments.output.json:
        print(to_json(facts))
    else:
        show(facts, arguments.output)
    return ExitCode.DONE


def gather() -> dict[str, Any]:
    """All of it, as `--json` prints it.

    Raises:
        InvalidArgumentError: `LAYERSKIP_CPU` names an instruction set that can't be used.
    """
    import torch

    from layerskip.cores import default_threads, find_cores
    from layerskip.machine import describe_machine, free_memory, processor_name, resident_bytes

    machine = describe_machine()
    cores = find_cores()
    threads, reason = default_threads(torch.get_num_threads(), cores)
    return {
        "versions": {"python": machine["python"], **machine["versions"]},
        "commit": machine["commit"],
        "system": f"{platform.system()} {platform.release()}",
        "processor": {
            "name": processor_name(),
            "architecture": platform.machine(),
            "logical": cores.logical,
            "physical": cores.physical,
            "fast": cores.fast,
            "quota": cores.quota,
        },
        "devices": _devices(),
        "kernels": _kernels(),
        "threads": {"count": threads, "because": reason},
        "folders": {"cache": str(cache_folder()), "hub": str(_hub_folder())},
        "memory": {"free": free_memory(torch.device("cpu")), "process": resident_bytes()},
    }


def _kernels() -> dict[str, Any]:
    from layerskip.model.native.library import find_variants, load_library, target_of
    from layerskip.model.native.variants import TARGET_VARIABLE

    library = load_library()
    forced = os.environ.get(TARGET_VARIABLE)
    variants = [variant for variant in find_variants() if variant.path.exists()]
    return {
        "chosen": None if library is None else target_of(library),
        "because": f"{TARGET_VARIABLE}={forced}" if forced else "the best that can run here",
        "variants": [
            {
                "target": variant.target,
                "file": variant.path.name,
                "bytes": variant.path.stat().st_size,
                "usable": variant.library is not None,
                "problem": variant.problem,
                "outdated": variant.outdated,
            }
            for variant in variants
        ],
    }


def _devices() -> list[dict[str, Any]]:
    import torch

    from layerskip.machine import free_memory

    return [
        {
            "device": f"cuda:{index}",
            "name": torch.cuda.get_device_name(index),
            "memory": torch.cuda.get_device_properties(index).total_memory,
            "free": free_memory(torch.device("cuda", index)),
        }
        for index in range(torch.cuda.device_count())
    ]


def _hub_folder() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def show(facts: dict[str, Any], output: OutputArguments) -> None:
    """Print it for a reader."""
    from rich.table import Table

    console = make_console(output)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    versions = dict(facts["versions"])
    own = f"layerskip {versions.pop('layerskip')}" + (f" (commit {facts['commit']})" if facts["commit"] else "")
    table.add_row("version", own)
    table.add_row("with", ", ".join(f"{name} {version}" for name, version in versions.items()))
    table.add_row("system", facts["system"])
    processor = facts["processor"]
    table.add_row("processor", f"{processor['name']}, {processor['architecture']}")
    for device in facts["devices"]:
        sizes = f"{size_text(device['memory'])}, {size_text(device['free'])} free"
        table.add_row("device", f"{device['device']}: {device['name']}, {sizes}")
    if not facts["devices"]:
        table.add_row("device", "cpu; torch sees no CUDA GPU")
    kernels = facts["kernels"]
    chosen = kernels["chosen"]
    table.add_row("kernels", f"{chosen}, {kernels['because']}" if chosen else "torch's: no compiled ones can run here")
    for variant in kernels["variants"]:
        state = "can run here" if variant["usable"] else variant["problem"]
        table.add_row("", f"{variant['file']} ({size_text(variant['bytes'])}): {state}")
    if not kernels["variants"]:
        table.add_row("", "none were built when the package was installed, which needs a C++ compiler")
    table.add_row("threads", f"{facts['threads']['count']}: {facts['threads']['because']}")
    table.add_row("cache", facts["folders"]["cache"])
    table.add_row("hub cache", facts["folders"]["hub"])
    memory = facts["memory"]
    free = "not reported" if memory["free"] is None else f"{size_text(memory['free'])} free"
    table.add_row("memory", free)
    console.print(table)
