"""What a sweep does with a model: follow the exits along a text, time calls, decode with settings.

Items are tuples that pickle, and samples are JSON, so that the work can be shared out.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from layerskip.decoding.adaptive.costs import MEASURED_QUERIES, measure_costs
from layerskip.decoding.config import GenerationConfig
from layerskip.errors import PromptTooLongError
from layerskip.evaluation.data.datasets import Example, encode_examples
from layerskip.evaluation.left_out import left_out_sample
from layerskip.evaluation.setting import Setting
from layerskip.evaluation.sweep.trajectories import Trajectory, record_trajectory
from layerskip.language_model import LanguageModel

TEXT, COSTS, TRIAL, RUN, FINAL = "text", "costs", "trial", "run", "final"
"""Kinds of samples: a prompt's text and who agrees with it; seconds of calls; a prompt decoded with a setting to learn
what rounds take; the same to measure the setting; the same once more, for the best of a whole grid."""
AUTOREGRESSIVE = Setting(0, 0)
"""Stands for decoding without drafts, which is measured in turn with the settings."""


@dataclass(frozen=True, kw_only=True)
class SweepWork:
    """What a worker is told; pickles."""

    load: Callable[[], LanguageModel]
    """Makes the model."""
    exits: Sequence[int]
    config: GenerationConfig

    def start(self) -> "SweepWorker":
        """A worker, with its model loaded."""
        return SweepWorker(self)


class SweepWorker:
    """Answers items; what is done for the first time is done twice, and the second counts."""

    def __init__(self, work: SweepWork) -> None:
        """Load the model."""
        self._work, self._lm = work, work.load()
        self._warm: set[Setting | str] = set()

    def __call__(self, item: tuple[Any, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Keys and samples of (TEXT, example), (COSTS, context, drafts) or (TRIAL | RUN | FINAL, example, settings)."""
        match item:
            case ("costs", int(context), int(most)):
                queries = [*(n for n in MEASURED_QUERIES if n <= most), most + 1]
                yield COSTS, asdict(measure_costs(self._lm.decoder, 1, context=context, queries=queries))
            case ("text", Example() as example):
                try:
                    yield text_key(example), {"index": example.index, **to_sample(self._follow(example))}
                except PromptTooLongError as error:
                    yield left_out_sample(example, error)
            case ("trial" | "run" | "final" as kind, Example() as example, list(settings)):
                # for every prompt in another order: a machine's speed drifts
                for setting in random.Random(example.index).sample(settings, len(settings)):
                    yield run_key(kind, example, setting), {"index": example.index, **self._decode(example, setting)}

    def _follow(self, example: Example) -> Trajectory:
        lm, work = self._lm, self._work
        (prompt,) = encode_examples(lm, [example], work.config)
        if self._is_first(TEXT):
            record_trajectory(lm, prompt, work.exits, work.config)
        return record_trajectory(lm, prompt, work.exits, work.config)

    def _decode(self, example: Example, setting: Setting) -> dict[str, Any]:
        lm, config = self._lm, self._work.config
        prompts = encode_examples(lm, [example], config)
        named = setting._asdict()
        options: dict[str, Any] = {"generation_strategy": "self_speculative", **named}
        if setting == AUTOREGRESSIVE:
            options = {"generation_strategy": "autoregressive"}
        if self._is_first(setting):
            lm.generate(prompts, config, **options)
        stats = lm.generate(prompts, config, **options)[0].stats
        figures = {name: getattr(stats, name) for name in ("tokens", "seconds", "drafted", "accepted")}
        return {**named, **figures, "prompt_seconds": stats.time_to_first_token_s}

    def _is_first(self, what: Setting | str) -> bool:
        first = what not in self._warm
        self._warm.add(what)
        return first


def text_key(example: Example) -> str:
    """Of the sample with a prompt's text."""
    return f"{TEXT}/{example.index}"


def run_key(kind: str, example: Example, setting: Setting) -> str:
    """Of the sample of a prompt decoded with a setting."""
    return f"{kind}/{example.index}/{setting.exit_layer}/{setting.num_speculations}"


def to_sample(trajectory: Trajectory) -> dict[str, Any]:
    """JSON of a trajectory."""
    bits = {str(exit_): "".join("01"[agrees] for agrees in flags) for exit_, flags in trajectory.agreement.items()}
    return {**vars(trajectory), "token_ids": list(trajectory.token_ids), "agreement": bits}


def from_sample(sample: dict[str, Any]) -> Trajectory:
    """The trajectory of a sample."""
    return Trajectory(
        prompt_tokens=sample["prompt_tokens"],
        token_ids=tuple(sample["token_ids"]),
        max_new_tokens=sample["max_new_tokens"],
        prompt_seconds=sample["prompt_seconds"],
        seconds=sample["seconds"],
        agreement={int(exit_): tuple(bit == "1" for bit in bits) for exit_, bits in sample["agreement"].items()},
    )
