"""The strategies that a benchmark compares, by name."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.output.events import FinishEvent, TokenEvent
from layerskip.decoding.request import choose_exit_layer
from layerskip.errors import InvalidArgumentError
from layerskip.evaluation.benchmark.runner import Decoded, Runner
from layerskip.language_model import LanguageModel

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
        pieces: list[tuple[str, str]] = []
        for event in self.lm.stream([prompt], self.config, **self.options):
            if isinstance(event, TokenEvent):
                pieces.append((event.text, event.source))
            elif isinstance(event, FinishEvent) and event.text:
                pieces.append((event.text, pieces[-1][1] if pieces else "decoded"))
        return pieces


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
        from layerskip.evaluation.benchmark.transformers_runner import TransformersRunner

        return TransformersRunner(lm, config, early_exit=name == "transformers_early_exit")
    early = {"exit_layer": _exit_layer(lm, config)}
    length = {} if config.num_speculations is None else {"num_speculations": config.num_speculations}
    options: dict[str, dict[str, Any]] = {
        "autoregressive": {"generation_strategy": "autoregressive", "exit_layer": None},
        "early_exit": {"generation_strategy": "early_exit", **early},
        "self_speculative": {"generation_strategy": "self_speculative", **early, **length},
        "adaptive": {"generation_strategy": "adaptive", "exit_layer": None, "num_speculations": None},
        "ngram": {"generation_strategy": "ngram", "exit_layer": None, **length},
    }
    return OwnRunner(lm=lm, config=config, options=options[name])


def _exit_layer(lm: LanguageModel, config: GenerationConfig) -> int:
    return choose_exit_layer(lm.configure(config, generation_strategy="self_speculative"), lm.decoder)
