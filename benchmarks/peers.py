"""Comparing the speed of this package with that of other programs: ways to do the same work, run in turn.

What is measured one after the other within seconds is compared with each other: the speed of a shared machine drifts,
and the ratios within a repetition don't. Each way runs on every prompt; its order changes from repetition to
repetition. The first repetition warms up, and its texts are compared.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

import layerskip
from layerskip.errors import InvalidArgumentError

__all__ = [
    "Comparison",
    "Run",
    "Spread",
    "Way",
    "common_length",
    "interleave",
    "load_each",
    "our_prompt",
    "our_text",
    "show",
]

PAUSE = 0.02
"""Seconds before each run: threads of OpenMP spin for milliseconds after their last work, on cores that others need."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One prompt, done in one way."""

    tokens: Sequence[int]
    """What was generated."""
    work: int
    """Tokens whose time was measured."""
    seconds: float


Way = Callable[[list[int]], Run]
"""From a prompt's tokens to what was done."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and range."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return cls(median=statistics.median(values), low=min(values), high=max(values))

    def format(self, digits: int) -> tuple[str, str]:
        """The median, and the range."""
        return f"{self.median:.{digits}f}", f"{self.low:.{digits}f} - {self.high:.{digits}f}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What ways to do the same work took."""

    speeds: Mapping[str, Sequence[float]]
    """Tokens/s by way and repetition."""
    texts: Mapping[str, Sequence[Sequence[int]]]
    """Generated tokens by way and prompt."""

    def ratio(self, way: str, reference: str) -> Spread:
        """Of the speeds within each repetition."""
        pairs = zip(self.speeds[way], self.speeds[reference], strict=True)
        return Spread.of([ours / theirs for ours, theirs in pairs])

    def same_texts(self, way: str, reference: str) -> int:
        """How many texts are equal."""
        return sum(list(a) == list(b) for a, b in zip(self.texts[way], self.texts[reference], strict=True))

    def common_tokens(self, way: str, reference: str) -> float:
        """Tokens until texts differ; the median over the prompts."""
        pairs = zip(self.texts[way], self.texts[reference], strict=True)
        return statistics.median(common_length(a, b) for a, b in pairs)

    def rows(self, reference: str) -> Iterator[tuple[str, ...]]:
        """Rows of a table: way, speed, range, ratio, range, equal texts, tokens until texts differ."""
        count = len(self.texts[reference])
        for way, speeds in self.speeds.items():
            texts = f"{self.same_texts(way, reference)} of {count}", f"{self.common_tokens(way, reference):.0f}"
            yield way, *Spread.of(speeds).format(1), *self.ratio(way, reference).format(2), *texts

    def record(self, reference: str) -> dict[str, Any]:
        """All of it as JSON, without the texts."""
        return {
            way: {
                "tokens_per_second": list(speeds),
                "ratio": vars(self.ratio(way, reference)),
                "same_texts": self.same_texts(way, reference),
                "common_tokens": self.common_tokens(way, reference),
            }
            for way, speeds in self.speeds.items()
        }


COLUMNS = ("way", "tokens/s", "min - max", "ratio", "min - max", "same texts", "until")
"""Of `Comparison.rows`."""


def interleave(ways: Mapping[str, Way], prompts: Sequence[list[int]], repetitions: int) -> Comparison:
    """Run all ways on all prompts, again and again."""
    if repetitions < 1:
        raise ValueError(f"repetitions must be at least 1, got {repetitions}")
    names = list(ways)
    speeds: dict[str, list[float]] = {name: [] for name in names}
    texts: dict[str, list[Sequence[int]]] = {name: [] for name in names}
    for repetition in range(repetitions + 1):
        work, seconds = dict.fromkeys(names, 0), dict.fromkeys(names, 0.0)
        first = repetition % len(names)
        for prompt in prompts:
            for name in names[first:] + names[:first]:
                time.sleep(PAUSE)
                run = ways[name](prompt)
                work[name] += run.work
                seconds[name] += run.seconds
                if repetition == 0:
                    texts[name].append(run.tokens)
        if repetition:
            for name in names:
                speeds[name].append(work[name] / seconds[name])
    return Comparison(speeds=speeds, texts=texts)


def load_each(
    source: str, computes: Sequence[str], options: Mapping[str, Any], console: Console
) -> Iterator[tuple[str, layerskip.LanguageModel]]:
    """A model in each way to compute that its format allows; others are named and left out.

    Args:
        source: A name for `layerskip.load`.
        computes: Values of its option `compute`.
        options: Its other options.
        console: Where to name them.
    """
    for compute in computes:
        settings: dict[str, Any] = {"dtype": "float32", "device": "cpu", **options, "compute": compute}
        try:
            lm = layerskip.load(source, **settings)
        except InvalidArgumentError as error:
            if not str(error).startswith(f"compute {compute!r}"):
                raise
            console.print(f"left out: {error}", markup=False, soft_wrap=True)
        else:
            yield compute, lm


def our_text(lm: layerskip.LanguageModel, max_new_tokens: int, *, with_prompt: bool = False, **options: Any) -> Way:
    """Greedy text of this package, past its end.

    Args:
        lm: The model.
        max_new_tokens: Tokens to generate.
        with_prompt: Whether all tokens and the whole call are measured; else not the first token, which belongs to the
            prompt, nor the time until it is there.
        **options: Of `LanguageModel.generate`.
    """

    def run(prompt: list[int]) -> Run:
        start = time.perf_counter()
        result = lm.generate([prompt], max_new_tokens=max_new_tokens, do_sample=False, ignore_eos=True, **options)[0]
        if with_prompt:
            return Run(tokens=result.token_ids, work=result.stats.tokens, seconds=time.perf_counter() - start)
        seconds = result.stats.seconds - result.stats.time_to_first_token_s
        return Run(tokens=result.token_ids, work=result.stats.tokens - 1, seconds=seconds)

    return run


def our_prompt(lm: layerskip.LanguageModel) -> Way:
    """A prompt until its first token."""

    def run(prompt: list[int]) -> Run:
        options = {"generation_strategy": "autoregressive", "do_sample": False, "ignore_eos": True}
        result = lm.generate([prompt], max_new_tokens=1, **options)[0]
        return Run(tokens=result.token_ids, work=len(prompt), seconds=result.stats.time_to_first_token_s)

    return run


def show(console: Console, title: str, comparison: Comparison, reference: str) -> None:
    """Print a comparison as a table."""
    table = Table(*COLUMNS, title=title, caption=f"ratios to {reference}; until: tokens until texts differ")
    for row in comparison.rows(reference):
        table.add_row(*row)
    console.print(table)


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens at the beginning that two texts have in common."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
