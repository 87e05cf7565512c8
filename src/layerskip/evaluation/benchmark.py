"""Strategies side by side on the prompts of a data set: speed, and whether quality holds.

All strategies take turns on every prompt, in another order each time, so that a machine whose speed drifts treats them
alike; what is compared was measured within seconds.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from layerskip.decoding.config import GenerationConfig
from layerskip.errors import InvalidArgumentError, PromptTooLongError
from layerskip.evaluation.benchmark_summary import summarize
from layerskip.evaluation.datasets import Example, encode_examples
from layerskip.evaluation.fan_out import Mapper, in_process
from layerskip.evaluation.left_out import LEFT_OUT, find_left_out, left_out_key, left_out_sample
from layerskip.evaluation.metrics import sample_metrics
from layerskip.evaluation.run_folder import RunFolder
from layerskip.language_model import LanguageModel
from layerskip.machine import resident_bytes

STRATEGIES = (
    "autoregressive",
    "early_exit",
    "self_speculative",
    "adaptive",
    "ngram",
    "transformers",
    "transformers_early_exit",
)
"""Names; the last two are transformers' own `generate`, for reference."""
SHOWN_TEXTS = 4
"""Prompts whose texts are also written piece by piece, telling what was drafted."""
Progress = Callable[[str, int], None]
"""Told what is done, and how many prompts were decoded."""


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """One prompt, decoded once."""

    text: str
    token_ids: list[int]
    stats: dict[str, Any]
    """Fields of `GenerationStats`, as far as the strategy has them."""


class Runner(Protocol):
    """Decodes a prompt by one strategy."""

    @property
    def options(self) -> dict[str, Any]:
        """What it was told, for the record."""
        ...

    def run(self, prompt: list[int]) -> Decoded:
        """Decode, timed."""
        ...


@dataclass(frozen=True, kw_only=True)
class OwnRunner:
    """One of this package's strategies."""

    lm: LanguageModel
    config: GenerationConfig
    options: dict[str, Any]

    def run(self, prompt: list[int]) -> Decoded:
        """Decode, timed."""
        result = self.lm.generate([prompt], self.config, **self.options)[0]
        return Decoded(text=result.text, token_ids=list(result.token_ids), stats=vars(result.stats))

    def pieces(self, prompt: list[int]) -> list[tuple[str, str]]:
        """The text in pieces, each with where it came from: accepted, corrected, bonus or decoded."""
        from layerskip.decoding.stream import FinishEvent, TokenEvent

        found: list[tuple[str, str]] = []
        for event in self.lm.stream([prompt], self.config, **self.options):
            if isinstance(event, TokenEvent):
                found.append((event.text, event.source))
            elif isinstance(event, FinishEvent) and event.text:
                found.append((event.text, found[-1][1] if found else "decoded"))
        return found


def make_runners(lm: LanguageModel, strategies: Sequence[str], config: GenerationConfig) -> dict[str, Runner]:
    """Runners by name.

    Args:
        lm: The model.
        strategies: Of `STRATEGIES`.
        config: What they share; its exit layer and draft length are those of the strategies that have them.

    Raises:
        InvalidArgumentError: An unknown strategy, one named twice, or none.
    """
    check_strategies(strategies)
    return {name: _make_runner(lm, name, config) for name in strategies}


def check_strategies(strategies: Sequence[str]) -> None:
    """Check names.

    Raises:
        InvalidArgumentError: An unknown strategy, one named twice, or none.
    """
    unknown = [name for name in strategies if name not in STRATEGIES]
    if unknown:
        raise InvalidArgumentError(f"strategy {unknown[0]!r} is not known; use some of {', '.join(STRATEGIES)}")
    if not strategies or len(set(strategies)) < len(strategies):
        raise InvalidArgumentError(f"strategies must be named once each, got {', '.join(strategies) or 'none'}")


def _make_runner(lm: LanguageModel, name: str, config: GenerationConfig) -> Runner:
    if name.startswith("transformers"):
        from layerskip.evaluation.transformers_runner import TransformersRunner

        return TransformersRunner(lm, config, early_exit=name == "transformers_early_exit")
    early = {"exit_layer": _exit_layer(lm, config)}
    length = {} if config.num_speculations is None else {"num_speculations": config.num_speculations}
    options: dict[str, dict[str, Any]] = {
        "autoregressive": {"generation_strategy": "autoregressive", "exit_layer": None},
        "early_exit": {"generation_strategy": "autoregressive", **early},
        "self_speculative": {"generation_strategy": "self_speculative", **early, **length},
        "adaptive": {"generation_strategy": "adaptive", "exit_layer": None, "num_speculations": None},
        "ngram": {"generation_strategy": "ngram", "exit_layer": None, **length},
    }
    return OwnRunner(lm=lm, config=config, options=options[name])


def _exit_layer(lm: LanguageModel, config: GenerationConfig) -> int:
    from layerskip.decoding.loop import choose_exit_layer

    return choose_exit_layer(lm.configure(config, generation_strategy="self_speculative"), lm.decoder)


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
    on_progress: Progress = lambda what, done: None,
) -> dict[str, Any]:
    """Decode every prompt by every strategy, and summarise.

    Args:
        work: How.
        examples: Prompts with references.
        run: Keeps every finished sample.
        mapper: Where the work is done.
        on_progress: Told after each prompt and strategy.

    Returns:
        The `results` of results.json.

    Raises:
        InvalidArgumentError: A strategy that isn't known, named twice, or none.
        PromptError: No prompt leaves room for an answer.
    """
    check_strategies(work.strategies)
    missing = []
    for example in examples:
        names = [name for name in work.strategies if sample_key(example, name) not in run.samples]
        on_progress("benchmark", len(work.strategies) - len(names))
        if names and left_out_key(example) not in run.samples:
            missing.append((example, names))
    for key, sample in mapper(missing, work.start):
        run.add(key, sample)
        on_progress(sample.get("strategy", "benchmark"), 1 if "strategy" in sample else len(work.strategies))
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
