"""The check of `lossless.py` over whole data sets: each comparison is kept in a folder, and an interrupted run goes on.

Prompts are taken in batches. A batch is decoded autoregressively and then by each setting; what one decoding gave is
kept before the next one begins, so that whatever ends the process costs one batch. Samples of the folder:

    conditions          what prompts, and which dtype, device and kernels; the same when the run goes on
    3/greedy            the autoregressive text of prompt 3, to compare with
    3/greedy/4/6        prompt 3 by exit 4 with 6 drafts: figures, and the first difference if there is one
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from typing import Any

from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.output.events import GenerationResult
from layerskip.decoding.request import check_prompt
from layerskip.differences import differences
from layerskip.errors import InvalidArgumentError, TokenizerError
from layerskip.evaluation.run_folder import RunFolder
from layerskip.evaluation.verify.compare import (
    NOTHING_TO_CHECK,
    Divergence,
    LosslessPlan,
    LosslessReport,
    Mode,
    SettingReport,
    compare,
    describe,
)
from layerskip.evaluation.verify.distribution import DistributionReport
from layerskip.language_model import LanguageModel

CONDITIONS = "conditions"
"""Key of the first sample."""
TOKENS_BEFORE, TOKENS_AFTER = 48, 16
"""Tokens of text that are kept with a difference."""


def run_lossless(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    plan: LosslessPlan,
    run: RunFolder,
    *,
    indices: Sequence[int] | None = None,
    on_progress: Callable[[str, int], None] = lambda what, num_prompts: None,
) -> LosslessReport:
    """Decode prompts autoregressively and self-speculatively, and compare; what the folder has isn't decoded again.

    Args:
        lm: The model.
        prompts: Token ids of each prompt.
        plan: What is compared, from `lossless.make_plan`.
        run: Keeps every comparison as it is finished.
        indices: Each prompt's record in its data set; its place among those checked if not given.
        on_progress: Called with what is under way, and the number of prompts just finished.

    Returns:
        The report of all prompts, whichever process compared them.

    Raises:
        InvalidArgumentError: No prompts, or the folder has the comparisons of other prompts or of another machine.
        PromptError: A prompt leaves no room; found before anything is decoded.
    """
    if not prompts:
        raise InvalidArgumentError(NOTHING_TO_CHECK)
    for place, prompt in enumerate(prompts):
        check_prompt(prompt, plan.base, lm.decoder, place)
    work = _Work(lm=lm, prompts=prompts, plan=plan, run=run, indices=indices or range(len(prompts)))
    work.check_conditions()
    for start in range(0, len(prompts), plan.batch_size):
        places = range(start, min(start + plan.batch_size, len(prompts)))
        for mode in plan.modes:
            work.decode(mode, places)
            on_progress(describe(mode), len(places))
            for setting in plan.settings:
                work.compare(mode, setting, places)
                on_progress(describe(mode, *setting), len(places))
    settings = [_summarize(mode, setting, len(prompts), run) for mode in plan.modes for setting in plan.settings]
    return LosslessReport(settings=settings, tolerance=plan.tolerance, num_prompts=len(prompts))


def run_distribution_test(
    run: RunFolder | None, key: str, test: Callable[[], DistributionReport]
) -> DistributionReport:
    """Run a test, or take its outcome from the folder.

    Args:
        run: Keeps the outcome; if not given, nothing does.
        key: Names the test in the folder.
        test: What runs it.
    """
    if run is None:
        return test()
    if key not in run.samples:
        run.add(key, asdict(test()))
    return DistributionReport(**{field.name: run.samples[key][field.name] for field in fields(DistributionReport)})


def to_results(report: LosslessReport, run: RunFolder, tests: Sequence[DistributionReport] = ()) -> dict[str, Any]:
    """The `results` of results.json.

    Args:
        report: From `run_lossless`.
        run: Its folder.
        tests: Distribution tests that were run.
    """
    settings = [asdict(setting) for setting in report.settings]
    for setting in settings:
        del setting["divergences"]  # they stand together, with their texts
    near_ties = sum(setting.near_ties for setting in report.settings)
    return {
        "settings": settings,
        "prompts": report.num_prompts,
        "tokens": sum(setting.tokens for setting in report.settings),
        "differences": near_ties + report.errors,
        "near_ties": near_ties,
        "errors": report.errors,
        "tolerance": report.tolerance,
        "distribution": [asdict(test) for test in tests],
        "divergences": list(_divergences(report, run)),
    }


def _divergences(report: LosslessReport, run: RunFolder) -> Iterator[dict[str, Any]]:
    """All differences as they are kept, each with its setting."""
    for s in report.settings:
        for divergence in s.divergences:
            sample = run.samples[_key(divergence.prompt, s.mode, (s.exit_layer, s.num_speculations))]
            setting = {name: sample[name] for name in ("index", "mode", "exit_layer", "num_speculations")}
            yield {**setting, **sample["divergence"]}


def _summarize(mode: Mode, setting: tuple[int, int], num_prompts: int, run: RunFolder) -> SettingReport:
    report = SettingReport(exit_layer=setting[0], num_speculations=setting[1], mode=mode)
    for place in range(num_prompts):
        sample = run.samples[_key(place, mode, setting)]
        kept = sample["divergence"]
        report.count(sample["tokens"], sample["drafted"], sample["accepted"])
        report.add(
            None if kept is None else Divergence(**{field.name: kept[field.name] for field in fields(Divergence)})
        )
    return report


def _key(place: int, mode: Mode, setting: tuple[int, int] | None = None) -> str:
    """Name of a text to compare with, or of a comparison, in the run's folder."""
    return f"{place}/{mode}" if setting is None else f"{place}/{mode}/{setting[0]}/{setting[1]}"


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What is done with one batch after the other."""

    lm: LanguageModel
    prompts: Sequence[Sequence[int]]
    plan: LosslessPlan
    run: RunFolder
    indices: Sequence[int]

    def check_conditions(self) -> None:
        """Texts of another device or dtype would differ for other reasons than speculation."""
        kept = self.run.samples.get(CONDITIONS)
        if kept is None:
            return
        there = {name: value for name, value in kept.items() if name != "key"}
        if differing := differences(there, self._conditions()):
            raise InvalidArgumentError(
                f"{self.run.path} holds comparisons made under other conditions ({', '.join(differing)}); "
                "name another folder, or delete it"
            )

    def decode(self, mode: Mode, places: Sequence[int]) -> None:
        """Write the texts to compare with."""
        missing = self._missing(_key(place, mode) for place in places)
        if not missing:
            return
        for place, result in self._generate(places, self.plan.autoregressive(mode)):
            if (key := _key(place, mode)) in missing:
                text = {"text": result.text, "token_ids": list(result.token_ids)}
                self._keep(key, {"index": self.indices[place], "mode": mode, "strategy": "autoregressive", **text})

    def compare(self, mode: Mode, setting: tuple[int, int], places: Sequence[int]) -> None:
        """Write the same texts by a setting, and judge differences."""
        missing = self._missing(_key(place, mode, setting) for place in places)
        if not missing:
            return
        for place, result in self._generate(places, self.plan.drafting(mode, *setting)):
            if (key := _key(place, mode, setting)) in missing:
                self._keep(
                    key,
                    {
                        "index": self.indices[place],
                        "mode": mode,
                        "exit_layer": setting[0],
                        "num_speculations": setting[1],
                        "tokens": result.stats.tokens,
                        "drafted": result.stats.drafted,
                        "accepted": result.stats.accepted,
                        "divergence": self._judge(mode, place, result.token_ids),
                    },
                )

    def _judge(self, mode: Mode, place: int, actual: Sequence[int]) -> dict[str, Any] | None:
        prompt, expected = self.prompts[place], self.run.samples[_key(place, mode)]["token_ids"]
        config, tolerance = self.plan.autoregressive(mode), self.plan.tolerance
        found = compare(self.lm, config, place, prompt, expected, actual, tolerance)
        if found is None:
            return None
        at = found.position
        return {
            **asdict(found),
            "tolerance": tolerance,
            "before": self._text([*prompt, *expected[:at]][-TOKENS_BEFORE:]),
            "expected_text": self._text(expected[at : at + TOKENS_AFTER]),
            "actual_text": self._text(actual[at : at + TOKENS_AFTER]),
        }

    def _text(self, token_ids: Sequence[int]) -> str | None:
        """Text with special tokens, which may be what differs; None without a tokenizer."""
        with suppress(TokenizerError):
            return str(self.lm.tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False))
        return None

    def _generate(self, places: Sequence[int], config: GenerationConfig) -> Iterable[tuple[int, GenerationResult]]:
        """Results of a whole batch: how texts round may depend on what they are decoded with."""
        results = self.lm.generate([list(self.prompts[place]) for place in places], config)
        return zip(places, results, strict=True)

    def _missing(self, keys: Iterable[str]) -> set[str]:
        return {key for key in keys if key not in self.run.samples}

    def _keep(self, key: str, sample: dict[str, Any]) -> None:
        if CONDITIONS not in self.run.samples:  # not before there is something that they are the conditions of
            self.run.add(CONDITIONS, self._conditions())
        self.run.add(key, sample)

    def _conditions(self) -> dict[str, Any]:
        decoder = self.lm.decoder
        return {
            "prompts": sha256(json.dumps([list(prompt) for prompt in self.prompts]).encode()).hexdigest()[:16],
            "dtype": str(decoder.dtype).removeprefix("torch."),
            "device": decoder.device.type,
            "kernels": decoder.kernels,
        }
