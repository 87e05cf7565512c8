"""Time to the first token of a prompt whose beginning was seen before, against the same prompt read whole.

    python benchmarks/prefixes.py --model demo --prefix-tokens 1000
    python benchmarks/prefixes.py --model smollm2 --prefix-tokens 1000

Each repetition makes a prefix of random tokens, generates after it in a session (which keeps its keys and values), and
then times a prompt of this prefix and a few other tokens twice: without a session, and in the session. Ratios are taken
within a repetition, and their median is what counts. Both must generate the same tokens.
"""

import random
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from models import ModelName, prepare
from record import environment, write_record

import layerskip


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark."""

    model: ModelName = "demo"
    prefix_tokens: int = 1000
    new_tokens: int = 8
    """Tokens of the prompt after the prefix."""
    max_new_tokens: int = 16
    slots: int = 4
    """Sequences that the session keeps."""
    repetitions: int = 7
    threads: int = 2


def main(arguments: Arguments) -> None:
    """Measure, print and record."""
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        lm = layerskip.load(prepare(arguments.model, Path(scratch)), device="cpu")
        measure(arguments, lm)


def measure(arguments: Arguments, lm: layerskip.LanguageModel) -> None:
    """Time both ways in turn and report."""
    pick, session = random.Random(0), lm.new_session(slots=arguments.slots)
    options = {"max_new_tokens": arguments.max_new_tokens, "ignore_eos": True, "generation_strategy": "autoregressive"}
    ratios, rows, same = [], [], True
    for repetition in range(arguments.repetitions + 1):
        prefix = [pick.randrange(lm.config.vocab_size) for _ in range(arguments.prefix_tokens)]
        prompt = [*prefix, *(pick.randrange(lm.config.vocab_size) for _ in range(arguments.new_tokens))]
        lm.stream([[*prefix, 1]], session=session, **options).run()
        (whole,) = lm.generate([prompt], **options)
        (seen,) = lm.stream([prompt], session=session, **options).run()
        assert seen.stats.cached_tokens == arguments.prefix_tokens, seen.stats
        same = same and seen.token_ids == whole.token_ids
        times = {"whole": whole.stats.time_to_first_token_s, "seen": seen.stats.time_to_first_token_s}
        if repetition:  # the first one warms up
            rows.append(times)
            ratios.append(times["seen"] / times["whole"])
    ratio = statistics.median(ratios)
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    print(
        f"{arguments.model}, prefix of {arguments.prefix_tokens} tokens: first token after "
        f"{1e3 * medians['whole']:.1f} ms read whole, {1e3 * medians['seen']:.1f} ms with the prefix seen before; "
        f"{ratio:.3f} x (median of {len(ratios)}), {'the same' if same else 'OTHER'} tokens"
    )
    path = write_record(
        "prefixes", {"arguments": vars(arguments), "runs": rows, "ratio": ratio, "same": same, "machine": environment()}
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
