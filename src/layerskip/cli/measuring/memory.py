"""`layerskip inspect --memory`: what a model needs of a device's memory, as a table or JSON."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from layerskip.checks import whole_number
from layerskip.cli.flags.arguments import ModelArguments, OutputArguments
from layerskip.cli.terminal.terminal import make_console, open_model
from layerskip.files import to_json

if TYPE_CHECKING:
    from layerskip.checkpoint.loading.memory.plan import MemoryPlan
    from layerskip.checkpoint.loading.plan import LoadingPlan


def show_memory(model: ModelArguments, output: OutputArguments, batch_size: int) -> None:
    """Print what a model needs; its weights aren't read.

    Args:
        model: Which model, and how it would be loaded.
        output: How to print.
        batch_size: Sequences at a time.

    Raises:
        LayerSkipError: As loading the model, but for a lack of memory.
    """
    whole_number("batch_size", batch_size, least=1)
    checkpoint = open_model(model, output)

    from layerskip.checkpoint.loading.memory.plan import plan_memory
    from layerskip.checkpoint.loading.plan import choose_plan
    from layerskip.checkpoint.unread import UnreadCheckpoint
    from layerskip.decoding.rounds.plain import PREFILL_CHUNK
    from layerskip.machine import free_memory

    unread = UnreadCheckpoint(checkpoint)
    plan = choose_plan(unread, model)
    memory = plan_memory(
        unread.network_config,
        unread.weights,
        plan,
        chunk=PREFILL_CHUNK,
        batch_size=batch_size,
        free=free_memory(plan.device),
    )
    if output.json:
        print(to_json({"model": checkpoint.name, **describe_plan(plan), **asdict(memory)}))
    else:
        print_memory(checkpoint.name, plan, memory, output)


def describe_plan(plan: "LoadingPlan") -> dict[str, Any]:
    """How the model would be loaded, as `--json` prints it."""
    return {
        "device": str(plan.device),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "kernels": plan.network,
        "quantize": plan.quantize,
    }


def print_memory(name: str, plan: "LoadingPlan", memory: "MemoryPlan", output: OutputArguments) -> None:
    """The tables, and what fits."""
    from rich.table import Table

    console = make_console(output)
    how = describe_plan(plan)
    console.print(f"{name}: {how['dtype']} on {how['device']}, {how['kernels']} kernels; nothing has been loaded")
    table = Table(title="memory")
    table.add_column("part")
    table.add_column("format")
    table.add_column("size", justify="right")
    for part in memory.parts:
        if part.kept:
            table.add_row(part.part, part.format, size_text(part.kept))
        if part.mapped:
            table.add_row(part.part, part.format, f"({size_text(part.mapped)} mapped)")
    table.add_section()
    table.add_row("weights", "", size_text(memory.weights))
    table.add_row("peak of loading", "", size_text(memory.peak))
    table.add_row(f"cache, 1 x {memory.context} tokens", how["dtype"], size_text(memory.cache))
    if memory.batch_size > 1:
        table.add_row(
            f"cache, {memory.batch_size} x {memory.context} tokens", how["dtype"], size_text(memory.batch_cache)
        )
    table.add_row("reading prompts", how["dtype"], size_text(memory.working))
    table.add_row("in all", "", size_text(memory.needed))
    console.print(table)
    _print_ranks(memory, output)
    console.print(verdict(memory), soft_wrap=True)


def _print_ranks(memory: "MemoryPlan", output: OutputArguments) -> None:
    from rich.table import Table

    if len(memory.ranks) < 2:
        return
    table = Table(title="for each of several processes that share the weights")
    for column in ("processes", "weights", "peak of loading", f"cache, 1 x {memory.context} tokens"):
        table.add_column(column, justify="right")
    for rank in memory.ranks:
        cache = rank.cache_per_token * (memory.context + 1)
        table.add_row(str(rank.ranks), size_text(rank.weights), size_text(rank.peak), size_text(cache))
    make_console(output).print(table)


def verdict(memory: "MemoryPlan") -> str:
    """Whether it fits, and how much would."""
    if memory.free is None:
        return "The system doesn't report how much memory is free."
    free = f"{size_text(memory.free)} are free"
    if memory.peak > memory.free:
        return f"The model doesn't fit: {free}. Use fewer bits (--quantize, --dtype) or a smaller model."
    if not memory.longest_context:
        return f"The weights fit, and no cache beside them: {free}. Use fewer bits (--quantize, --dtype)."
    longest = f"a single sequence may have {memory.longest_context} tokens"
    if memory.longest_context == memory.context:
        longest += ", the whole context"
    return f"{free}: {longest}; sequences of {memory.context} tokens fit {memory.largest_batch} at a time."


def size_text(num_bytes: int) -> str:
    """Bytes in a unit that suits them."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.2f} GiB"
    return f"{num_bytes / 2**20:.1f} MiB"
