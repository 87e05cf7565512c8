"""Proof that speculation changes nothing: prompts are decoded with and without drafts, and compared token by token.

Prompts are taken in batches. A batch is decoded autoregressively and then with each setting. The outcome of one
decoding is kept before the next one begins, so that an interrupted run in a folder loses one batch at most. Samples:

    conditions          the prompts' hash, and dtype, device and kernels; the same when the run goes on
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
from layerskip.evaluation.progress import Meter, Progress, ignore_progress
from layerskip.evaluation.samples import SampleStore
from layerskip.evaluation.setting import Setting
from layerskip.evaluation.verify.compare import (
    NOTHING_TO_VERIFY,
    Divergence,
    Mode,
    SettingReport,
    VerifyPlan,
    VerifyReport,
    compare,
    describe,
)
from layerskip.evaluation.verify.distribution import DistributionReport
from layerskip.language_model import LanguageModel

CONDITIONS = "conditions"
"""Key of the first sample."""
TOKENS_BEFORE, TOKENS_AFTER = 48, 16
"""Tokens of text that are kept with a difference."""


def verify(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    plan: VerifyPlan,
    store: SampleStore | None = None,
    *,
    indices: Sequence[int] | None = None,
    on_progress: Progress = ignore_progress,
) -> VerifyReport:
    """Decode prompts autoregressively and self-speculatively, and compare.

    Args:
        lm: The model.
        prompts: Token ids of each prompt.
        plan: What is compared, from `make_plan`.
        store: Keeps every comparison as it is finished; what it has isn't decoded again. Memory if not given.
        indices: Each prompt's record in its data set; its place among those verified if not given.
        on_progress: Told of every prompt that was decoded in one way.

    Returns:
        The report of all prompts, whichever process compared them.

    Raises:
        InvalidArgumentError: No prompts, or the store has the comparisons of other prompts or of another machine.
        PromptError: A prompt leaves no room; found before anything is decoded.
    """
    if not prompts:
        raise InvalidArgumentError(NOTHING_TO_VERIFY)
    for place, prompt in enumerate(prompts):
        check_prompt(prompt, plan.base, lm.decoder, place)
    store = store or SampleStore()
    work = _Work(lm=lm, prompts=prompts, plan=plan, store=store, indices=indices or range(len(prompts)))
    work.check_conditions()
    meter = Meter(on_progress, len(prompts) * len(plan.modes) * (1 + len(plan.settings)))
    for start in range(0, len(prompts), plan.batch_size):
        places = range(start, min(start + plan.batch_size, len(prompts)))
        for mode in plan.modes:
            work.decode(mode, places)
            meter.advance(describe(mode), len(places))
            for setting in plan.settings:
                work.compare(mode, setting, places)
                meter.advance(describe(mode, setting), len(places))
    settings = [_summarize(mode, setting, len(prompts), store) for mode in plan.modes for setting in plan.settings]
    return VerifyReport(settings=settings, tolerance=plan.tolerance, num_prompts=len(prompts))


def run_distribution_test(store: SampleStore, key: str, test: Callable[[], DistributionReport]) -> DistributionReport:
    """Run a test, or take its outcome from the store.

    Args:
        store: Keeps the outcome.
        key: Names the test in the store.
        test: What runs it.
    """
    if key not in store.samples:
        store.add(key, asdict(test()))
    return DistributionReport(**{field.name: store.samples[key][field.name] for field in fields(DistributionReport)})


def to_results(report: VerifyReport, store: SampleStore, tests: Sequence[DistributionReport] = ()) -> dict[str, Any]:
    """The `results` of results.json.

    Args:
        report: From `verify`.
        store: Its samples.
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
        "divergences": list(_divergences(report, store)),
    }


def _divergences(report: VerifyReport, store: SampleStore) -> Iterator[dict[str, Any]]:
    """All differences as they are kept, each with its setting."""
    for s in report.settings:
        for divergence in s.divergences:
            sample = store.samples[_key(divergence.prompt, s.mode, Setting(s.exit_layer, s.num_speculations))]
            setting = {name: sample[name] for name in ("index", "mode", "exit_layer", "num_speculations")}
            yield {**setting, **sample["divergence"]}


def _summarize(mode: Mode, setting: Setting, num_prompts: int, store: SampleStore) -> SettingReport:
    report = SettingReport(mode=mode, **setting._asdict())
    for place in range(num_prompts):
        sample = store.samples[_key(place, mode, setting)]
        kept = sample["divergence"]
        report.count(sample["tokens"], sample["drafted"], sample["accepted"])
        report.add(
            None if kept is None else Divergence(**{field.name: kept[field.name] for field in fields(Divergence)})
        )
    return report


def _key(place: int, mode: Mode, setting: Setting | None = None) -> str:
    """Name of a text to compare with, or of a comparison, in the store."""
    return "/".join(map(str, (place, mode, *(setting or ()))))


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What is done with one batch after the other."""

    lm: LanguageModel
    prompts: Sequence[Sequence[int]]
    plan: VerifyPlan
    store: SampleStore
    indices: Sequence[int]

    def check_conditions(self) -> None:
        """Texts of another device or dtype would differ for other reasons than speculation."""
        kept = self.store.samples.get(CONDITIONS)
        if kept is None:
            return
        there = {name: value for name, value in kept.items() if name != "key"}
        if differing := differences(there, self._conditions()):
            raise InvalidArgumentError(
                f"{self.store.place} has comparisons made under other conditions ({', '.join(differing)}); "
                "name another folder, or delete it"
            )

    def decode(self, mode: Mode, places: Sequence[int]) -> None:
        """Generate the texts to compare with."""
        missing = self._missing(_key(place, mode) for place in places)
        if not missing:
            return
        for place, result in self._generate(places, self.plan.autoregressive(mode)):
            if (key := _key(place, mode)) in missing:
                text = {"text": result.text, "token_ids": list(result.token_ids)}
                self._keep(key, {"index": self.indices[place], "mode": mode, "strategy": "autoregressive", **text})

    def compare(self, mode: Mode, setting: Setting, places: Sequence[int]) -> None:
        """Generate the same texts with a setting, and judge differences."""
        missing = self._missing(_key(place, mode, setting) for place in places)
        if not missing:
            return
        for place, result in self._generate(places, self.plan.drafting(mode, setting)):
            if (key := _key(place, mode, setting)) in missing:
                self._keep(
                    key,
                    {
                        "index": self.indices[place],
                        "mode": mode,
                        **setting._asdict(),
                        "tokens": result.stats.tokens,
                        "drafted": result.stats.drafted,
                        "accepted": result.stats.accepted,
                        "divergence": self._judge(mode, place, result.token_ids),
                    },
                )

    def _judge(self, mode: Mode, place: int, actual: Sequence[int]) -> dict[str, Any] | None:
        prompt, expected = self.prompts[place], self.store.samples[_key(place, mode)]["token_ids"]
        config, tolerance = self.plan.autoregressive(mode), self.plan.tolerance
        divergence = compare(self.lm, config, place, prompt, expected, actual, tolerance)
        if divergence is None:
            return None
        at = divergence.position
        return {
            **asdict(divergence),
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
        """Results of a whole batch: how logits are rounded may depend on which prompts are decoded together."""
        results = self.lm.generate([list(self.prompts[place]) for place in places], config)
        return zip(places, results, strict=True)

    def _missing(self, keys: Iterable[str]) -> set[str]:
        return {key for key in keys if key not in self.store.samples}

    def _keep(self, key: str, sample: dict[str, Any]) -> None:
        if CONDITIONS not in self.store.samples:  # not before there is something that they are the conditions of
            self.store.add(CONDITIONS, self._conditions())
        self.store.add(key, sample)

    def _conditions(self) -> dict[str, Any]:
        decoder = self.lm.decoder
        return {
            "prompts": sha256(json.dumps([list(prompt) for prompt in self.prompts]).encode()).hexdigest()[:16],
            "dtype": str(decoder.dtype).removeprefix("torch."),
            "device": decoder.device.type,
            "kernels": decoder.kernels,
        }
