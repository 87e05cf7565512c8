"""Cost of the recipe: time and peak memory of a training step against plain training of the same model.

    python benchmarks/training_cost.py
    python benchmarks/training_cost.py --layers 12 --width 192 --exit-loss kl
    python benchmarks/training_cost.py --shape smollm2 --dropout-max 0.1 --rotations 1

Both are transformers' model classes with the same optimizer, batch and data. Time: steps of the two alternate in one
process, over whole rotations of the exits, and ratios are computed between neighbours. Memory: the peak of a process
that trains one of them alone, minus its memory before it has a model. Layer dropout has its full rate throughout, as in
continual pretraining; from scratch the rate grows from 0, and saves about half as much.
"""

import json
import multiprocessing
import resource
import statistics
import time
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
import tyro
from record import environment, write_record
from rich.console import Console
from rich.table import Table

from layerskip import LayerSkipConfig, LayerSkipRecipe


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark."""

    shape: Literal["own", "smollm2"] = "own"
    """smollm2: 30 layers of width 576, a vocabulary of 49,152, in bfloat16; own: the sizes below."""
    layers: int = 16
    width: int = 256
    vocab_size: int = 4096
    batch_size: int = 8
    sequence_length: int = 256
    dropout_max: float = 0.2
    exit_loss: str = "ce"
    rotation: int = 8
    rotations: int = 3
    """Rotations of the exits that are timed."""
    threads: int = 2
    json: bool = False


class Training:
    """A model, an optimizer and a step."""

    def __init__(self, arguments: Arguments, *, with_recipe: bool) -> None:
        """Make a model with random weights."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        heads = max(1, arguments.width // 64)
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=arguments.vocab_size,
                hidden_size=arguments.width,
                intermediate_size=arguments.width * 11 // 4,
                num_hidden_layers=arguments.layers,
                num_attention_heads=heads,
                num_key_value_heads=heads // 3 if heads % 3 == 0 else max(1, heads // 2),
                tie_word_embeddings=True,
            )
        ).train()
        config = LayerSkipConfig(
            dropout_max=arguments.dropout_max,
            exit_loss=arguments.exit_loss,  # type: ignore[arg-type]
            rotation=arguments.rotation,
        )
        self.recipe = LayerSkipRecipe(self.model, config) if with_recipe else None
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.bfloat16 = arguments.shape == "smollm2"
        shape = (arguments.batch_size, arguments.sequence_length)
        self.tokens = torch.randint(0, arguments.vocab_size, shape)

    def step(self, index: int) -> float:
        """One step; returns its seconds."""
        start = time.perf_counter()
        if self.recipe is not None:
            self.recipe.begin_step(index, 1_000_000)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            loss = self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


def time_ratios(arguments: Arguments) -> tuple[list[float], list[float]]:
    """Seconds of plain steps and of steps with the recipe, which alternate."""
    plain, ours = Training(arguments, with_recipe=False), Training(arguments, with_recipe=True)
    for training in (plain, ours):  # the first steps allocate the optimizer's state
        training.step(0)
        training.step(1)
    pairs = []
    for index in range(arguments.rotations * arguments.rotation):
        first, second = (plain, ours) if index % 2 else (ours, plain)
        seconds = {id(first): first.step(index), id(second): second.step(index)}
        pairs.append((seconds[id(plain)], seconds[id(ours)]))
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def peak_memory(arguments: Arguments, with_recipe: bool, answer: Any) -> None:
    """Put the peak bytes of training into a queue."""
    torch.set_num_threads(arguments.threads)
    import transformers.models.llama.modeling_llama  # noqa: F401

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    training = Training(arguments, with_recipe=with_recipe)
    for index in range(2 * arguments.rotation):
        training.step(index)
    answer.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def measure_memory(arguments: Arguments, with_recipe: bool) -> int:
    """Peak bytes of a fresh process."""
    context = multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    process = context.Process(target=peak_memory, args=(arguments, with_recipe, answer))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("a process that measures memory has failed")
    return int(answer.get())


def main(arguments: Arguments) -> None:
    """Measure, print and record."""
    if arguments.shape == "smollm2":
        arguments = replace(arguments, layers=30, width=576, vocab_size=49_152)
    torch.set_num_threads(arguments.threads)
    memory = {name: measure_memory(arguments, with_recipe) for name, with_recipe in (("plain", False), ("ours", True))}
    plain, ours = time_ratios(arguments)
    turn = arguments.rotation
    ratios = [sum(ours[i : i + turn]) / sum(plain[i : i + turn]) for i in range(0, len(plain), turn)]
    result = {
        "arguments": {field.name: getattr(arguments, field.name) for field in fields(arguments)},
        "time_ratio": statistics.median(ratios),
        "time_ratios_by_rotation": ratios,
        "memory_ratio": memory["ours"] / memory["plain"],
        "peak_memory_bytes": memory,
        "seconds_plain": statistics.median(plain),
        "seconds_ours": statistics.median(ours),
    }
    path = write_record("training_cost", result)
    if arguments.json:
        print(json.dumps({"environment": environment(), **result}))
        return
    table = Table(title=f"{arguments.layers} layers, width {arguments.width}, p_max {arguments.dropout_max}")
    for name in ("", "seconds a step", "peak memory (MB)"):
        table.add_column(name)
    table.add_row("plain", f"{result['seconds_plain']:.3f}", f"{memory['plain'] / 1e6:.0f}")
    table.add_row("recipe", f"{result['seconds_ours']:.3f}", f"{memory['ours'] / 1e6:.0f}")
    table.add_row("ratio", f"{result['time_ratio']:.3f}", f"{result['memory_ratio']:.3f}")
    Console().print(table)
    Console().print(f"by rotation: {', '.join(f'{ratio:.3f}' for ratio in ratios)}; {path}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
