"""Strategies side by side on the prompts of a data set: speed, and whether quality holds.

All strategies take turns on every prompt, in another order each time, so that a machine whose speed drifts treats them
alike; what is compared was measured within seconds.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from layerskip.decoding.config import GenerationConfig
from layerskip.errors import PromptTooLongError
from layerskip.evaluation.benchmark.runner import Runner
from layerskip.evaluation.benchmark.runners import OwnRunner, check_strategies, make_runners
from layerskip.evaluation.benchmark.summary import summarize
from layerskip.evaluation.data.datasets import Example, encode_examples
from layerskip.evaluation.data.metrics import sample_metrics
from layerskip.evaluation.left_out import LEFT_OUT, find_left_out, left_out_key, left_out_sample
from layerskip.evaluation.progress import Meter, Progress, ignore_progress
from layerskip.evaluation.run_folder import RunFolder
from layerskip.language_model import LanguageModel
from layerskip.machine import resident_bytes
from layerskip.workers.fan_out import Mapper, in_process

SHOWN_TEXTS = 4
"""Prompts whose texts are also written piece by piece, telling what was drafted."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkWork:
    """What a worker is told; pickles."""

    load: Callable[[], LanguageModel]
    """Makes the model."""
    strategies: Sequence[str]
    config: GenerationConfig
    dataset: str
    """Its name says which metrics apply."""
    execute_code: bool = False
    """Run generated programs, for pass@1 of human_eval."""

    def start(self) -> "BenchmarkWorker":
        """A worker, with its model loaded."""
        return BenchmarkWorker(self)


class BenchmarkWorker:
    """Decodes one prompt after the other by all strategies that are missing for it."""

    def __init__(self, work: BenchmarkWork) -> None:
        """Load the model."""
        self._work, self._lm = work, work.load()
        self._runners = make_runners(self._lm, work.strategies, work.config)
        self._warm: set[str] = set()

    def __call__(self, item: tuple[Example, Sequence[str]]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Keys and samples, for an example and the strategies that it is to be decoded by."""
        example, names = item
        try:
            (prompt,) = encode_examples(self._lm, [example], self._work.config)
        except PromptTooLongError as error:
            yield left_out_sample(example, error)
            return
        for name in random.Random(example.index).sample(list(names), len(names)):
            runner = self._runners[name]
            if name not in self._warm:
                runner.run(prompt)
                self._warm.add(name)
            yield sample_key(example, name), self._sample(name, runner, example, prompt)

    def _sample(self, name: str, runner: Runner, example: Example, prompt: list[int]) -> dict[str, Any]:
        decoded = runner.run(prompt)
        sample: dict[str, Any] = {
            "index": example.index,
            "strategy": name,
            "options": runner.options,
            "prompt": example.prompt,
            "reference": example.reference,
            "text": decoded.text,
            "token_ids": decoded.token_ids,
            "stats": decoded.stats,
            "memory_bytes": _memory(self._lm),
        }
        if isinstance(runner, OwnRunner) and example.index < SHOWN_TEXTS:
            sample["pieces"] = runner.pieces(prompt)
        dataset, execute = self._work.dataset, self._work.execute_code
        sample["metrics"] = sample_metrics(dataset, decoded.text, example, execute_code=execute)
        return sample


def sample_key(example: Example, strategy: str) -> str:
    """Name of a sample in the run's folder."""
    return f"{example.index}/{strategy}"


def benchmark(
    work: BenchmarkWork,
    examples: Sequence[Example],
    run: RunFolder,
    *,
    mapper: Mapper = in_process,
    on_progress: Progress = ignore_progress,
) -> dict[str, Any]:
    """Decode every prompt by every strategy, and summarise.

    Args:
        work: How.
        examples: Prompts with references.
        run: Keeps every finished sample.
        mapper: Where the work is done.
        on_progress: Told of every prompt that was decoded by a strategy.

    Returns:
        The `results` of results.json.

    Raises:
        InvalidArgumentError: A strategy that isn't known, named twice, or none.
        PromptError: No prompt leaves room for an answer.
    """
    check_strategies(work.strategies)
    meter = Meter(on_progress, len(examples) * len(work.strategies))
    missing = []
    for example in examples:
        names = [name for name in work.strategies if sample_key(example, name) not in run.samples]
        meter.advance("benchmark", len(work.strategies) - len(names))
        if names and left_out_key(example) not in run.samples:
            missing.append((example, names))
    for key, sample in mapper(missing, work.start):
        run.add(key, sample)
        meter.advance(sample.get("strategy", "benchmark"), 1 if "strategy" in sample else len(work.strategies))
    examples, left_out = find_left_out(examples, run.samples)
    samples = {name: [run.samples[sample_key(example, name)] for example in examples] for name in work.strategies}
    return {**summarize(work.dataset, samples), LEFT_OUT: left_out}


def _memory(lm: LanguageModel) -> int:
    """Bytes that the process holds now; on CUDA the most that tensors took since the last call."""
    import torch

    device = lm.decoder.device
    if device.type != "cuda":
        return resident_bytes()
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak
