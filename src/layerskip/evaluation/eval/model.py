"""Our engine as a model of EleutherAI's lm-evaluation-harness (`lm_eval`), at a given exit.

What a request means (how texts become tokens, what is cut, where a text ends) follows the harness's own model for
transformers, `hf`, so that scores can be compared with published ones.

Log-likelihoods are those of the first E layers, the norm and the head. Texts of an early exit are written by its
layers alone, one token a step; those of the whole network by any strategy.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from layerskip.checks import check_text
from layerskip.decoding.config import GenerationConfig
from layerskip.errors import InvalidArgumentError, PromptError, TokenizerError
from layerskip.evaluation.eval.answers import Answers
from layerskip.evaluation.eval.options import MAX_NEW_TOKENS, TaskOptions, writing_config
from layerskip.evaluation.eval.scoring import Likelihood, score_continuations
from layerskip.evaluation.progress import Meter, Progress, ignore_progress
from layerskip.evaluation.samples import SampleStore
from layerskip.language_model import LanguageModel
from layerskip.text.chat_template import render

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from transformers import PreTrainedTokenizerBase


@dataclass(kw_only=True)
class Text:
    """A text to write."""

    key: str
    context: str
    until: list[str]
    tokens: list[int]


class EngineMethods:
    """What the harness asks of a model; `make_model` puts the harness's base class behind it."""

    backend = "causal"

    def __init__(
        self,
        lm: LanguageModel,
        exit_layer: int,
        *,
        config: GenerationConfig,
        batch_size: int = 1,
        store: SampleStore,
        scored_exits: Sequence[int],
        on_progress: Progress = ignore_progress,
    ) -> None:
        super().__init__()
        self._lm = lm
        self._batch_size = batch_size
        self._on_progress = on_progress
        self._options = TaskOptions(lm, config)
        self.exit_layer = lm.config.check_exit_layer(exit_layer)
        self.answers = Answers(exit_layer=exit_layer, store=store)
        self._scored = [
            self.answers if other == exit_layer else Answers(exit_layer=other, store=store)
            for other in sorted({exit_layer, *scored_exits})
        ]

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return self._lm.tokenizer

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @property
    def eot_token_id(self) -> int | None:
        token: int | None = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        tokens = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        token = next((token for token in tokens if token is not None), None)
        if token is None:
            raise TokenizerError(
                "the tokenizer has neither a token for the beginning nor one for the end of a text, so that texts "
                "without context can't be scored; set bos_token in tokenizer_config.json"
            )
        return int(token)

    @property
    def max_length(self) -> int:
        """Tokens that a context and its continuation may have, the last one not counted."""
        return self._lm.decoder.max_context

    @property
    def max_gen_toks(self) -> int:
        return MAX_NEW_TOKENS

    @property
    def batch_size(self) -> int:
        return self._batch_size

    def get_model_info(self) -> dict[str, Any]:
        """What the harness's result files say of the model."""
        decoder = self._lm.decoder
        return {
            "model_num_parameters": self._lm.checkpoint.num_parameters,
            "model_dtype": str(decoder.dtype),
            "model_num_layers": decoder.num_layers,
            "model_exit_layer": self.exit_layer,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; special tokens come in front as the tokenizer does it, unless the text has them already."""
        check_text(string, "a text of the task")
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and self._begins_specially(string):
            options = {"add_special_tokens": False}
        return list(self.tokenizer.encode(string, **options))

    def _begins_specially(self, string: str) -> bool:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        first = eos if bos is None else bos
        return first is not None and string.startswith(str(self.tokenizer.decode([first])))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as one text; without its system message where the template knows none."""
        apply = partial(
            render,
            self.tokenizer,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        try:
            return apply(chat_history)
        except PromptError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            return apply(others)

    # Log-likelihoods. `loglikelihood` itself is the harness's: it splits texts into tokens and calls this.

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        keys = [self.answers.key("loglikelihood", *texts) for texts, _, _ in requests]
        groups: dict[tuple[int, ...], dict[str, list[int]]] = {}
        for key, (texts, context, continuation) in zip(keys, requests, strict=True):
            if not continuation:
                self._add_empty(key)
                continue
            before, after = self._fit(context, continuation, texts)
            groups.setdefault(tuple(before), {})[key] = after
        tell = self._counter("scoring", keys)
        for context_ids, members in sorted(groups.items(), key=_size, reverse=True):  # out of memory? Then at once
            todo = {key: after for key, after in members.items() if not self.answers.find(key)}
            if not todo:
                continue
            started = time.perf_counter()
            scores = self._score(context_ids, list(todo.values()))
            seconds = (time.perf_counter() - started) / len(todo)
            for i, (key, after) in enumerate(todo.items()):
                likelihoods = [{"logprob": by_exit[i][0], "is_greedy": by_exit[i][1]} for by_exit in scores]
                self._add_scored(key, likelihoods, len(after), seconds)
                tell()
        return [(self.answers.asked[key]["logprob"], self.answers.asked[key]["is_greedy"]) for key in keys]

    def _score(self, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[list[Likelihood]]:
        """By exit that is scored in the same pass, by continuation."""
        exits = [answers.exit_layer for answers in self._scored]
        return score_continuations(self._lm.decoder, context, continuations, exits)

    def _add_scored(self, key: str, by_exit: Sequence[dict[str, Any]], tokens: int, seconds: float) -> None:
        """Keep a request's answers at all exits of the pass; they share its time."""
        shared = {"tokens_scored": tokens, "seconds": seconds / len(self._scored)}
        for answers, answer in zip(self._scored, by_exit, strict=True):
            if not answers.find(answers.here(key)):
                answers.add(answers.here(key), {**answer, **shared})

    def _add_empty(self, key: str) -> None:
        """Answer a request whose continuation has no token of its own: one token spans its joint with the context.

        The harness takes the tokens of both texts together, less as many as the context has alone. Where that leaves
        none, its sum over the continuation's tokens is 0, and all of them are the likeliest.
        """
        if not self.answers.find(key):
            self._add_scored(key, [{"logprob": 0.0, "is_greedy": True}] * len(self._scored), 0, 0.0)

    def _fit(self, context: list[int], continuation: list[int], texts: tuple[str, str]) -> tuple[list[int], list[int]]:
        """Cut a context from the left, so that it and the continuation fit."""
        if len(continuation) > self.max_length:
            raise PromptError(
                f"a continuation has {len(continuation)} tokens, more than the context of {self.max_length}: "
                f"{texts[1][:40]!r}..."
            )
        whole = [*(context or [self.prefix_token_id]), *continuation][-(self.max_length + 1) :]
        return whole[: -len(continuation)], continuation

    def loglikelihood_rolling(self, requests: "Sequence[Instance]", disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows that each begin where the one before ended."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        texts = {self.answers.key("loglikelihood_rolling", r.args[0]): str(r.args[0]) for r in requests}
        tell = self._counter("scoring texts", texts)
        for key, text in sorted(texts.items(), key=lambda item: len(item[1]), reverse=True):
            if self.answers.find(key):
                continue
            started = time.perf_counter()
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            totals, tokens = [0.0] * len(self._scored), 0
            for context, continuation in map(make_disjoint_window, windows):
                scores = self._score(context, [continuation])
                totals = [total + logprob for total, ((logprob, _),) in zip(totals, scores, strict=True)]
                tokens += len(continuation)
            self._add_scored(key, [{"logprob": total} for total in totals], tokens, time.perf_counter() - started)
            tell()
        keys = (self.answers.key("loglikelihood_rolling", request.args[0]) for request in requests)
        return [self.answers.asked[key]["logprob"] for key in keys]

    # Texts

    def generate_until(self, requests: "Sequence[Instance]", disable_tqdm: bool = False) -> list[str]:
        """Write after each context; batches are the same whether or not some of it was written before."""
        groups: dict[GenerationConfig, dict[str, Text]] = {}
        keys, seen = [], Counter[str]()
        for request in requests:
            context, options = request.args
            config, until = self._options.read(options)
            repetition = 0
            if config.samples:  # the same request again wants another text
                same = self.answers.key("generate_until", context, options)
                repetition = seen[same]
                seen[same] += 1
                config = replace(config, seed=(config.seed or 0) + repetition)
            key = self.answers.key("generate_until", context, options, repetition)
            tokens = self._encode_context(context, config.max_new_tokens)
            groups.setdefault(config, {})[key] = Text(key=key, context=context, until=until, tokens=tokens)
            keys.append(key)
        tell = self._counter("writing", keys)
        for config, texts in groups.items():
            ordered = sorted(texts.values(), key=lambda text: len(text.tokens), reverse=True)
            for start in range(0, len(ordered), self._batch_size):
                batch = [text for text in ordered[start : start + self._batch_size] if not self.answers.find(text.key)]
                for _ in self._write(batch, config):
                    tell()
        return [self.answers.asked[key]["text"] for key in keys]

    def _write(self, batch: Sequence[Text], config: GenerationConfig) -> Iterator[Text]:
        """Write and keep a batch; tells each text that is kept."""
        if not batch:
            return
        from lm_eval.models.utils import postprocess_generated_text

        started = time.perf_counter()
        results = self._lm.generate([text.tokens for text in batch], config)
        seconds = (time.perf_counter() - started) / len(batch)
        for text, result in zip(batch, results, strict=True):
            # The harness reads a text by itself; ours goes on from the prompt, and may begin with another space.
            written = str(self.tokenizer.decode(result.token_ids, skip_special_tokens=True))
            if isinstance(result.stop_reason, str):  # one with special tokens isn't in the text, where it would be cut
                written = _cut_like(written, result.text)
            stats = result.stats
            answer = {
                "text": postprocess_generated_text(written, text.until, None),
                "tokens": stats.tokens,
                "seconds": seconds,
                "rounds": stats.rounds,
                "drafted": stats.drafted,
                "accepted": stats.accepted,
                "prompt": text.context,
            }
            self.answers.add(text.key, answer)
            yield text

    def _encode_context(self, context: str, max_new_tokens: int) -> list[int]:
        """Token ids of a context, cut from the left to leave room."""
        room = self.max_length - max_new_tokens
        if room < 1:
            raise InvalidArgumentError(
                f"a task asks for up to {max_new_tokens} tokens, and the context of {self.max_length} must hold them "
                "and at least one of the prompt; set max_gen_toks in the task's generation_kwargs"
            )
        return self.tok_encode(context)[-room:] or [self.prefix_token_id]

    def _counter(self, what: str, keys: Iterable[str]) -> Callable[[], None]:
        """Reports how far requests are, now and whenever it is called."""
        unique = set(keys)
        what, meter = f"{what}, exit {self.exit_layer}", Meter(self._on_progress, len(unique))
        meter.advance(what, sum(map(self.answers.find, unique)))
        return partial(meter.advance, what)


def make_model(
    lm: LanguageModel,
    exit_layer: int,
    *,
    config: GenerationConfig | None = None,
    batch_size: int = 1,
    store: SampleStore | None = None,
    scored_exits: Sequence[int] = (),
    on_progress: Progress = ignore_progress,
) -> "TemplateLM":
    """A model for `lm_eval.simple_evaluate`.

    Args:
        lm: The model.
        exit_layer: Layers that score and write (1..L).
        config: How texts are written with all layers; tasks say how long, until what, and whether they are sampled.
        batch_size: Texts to write together.
        store: Keeps every finished request, and has those of an earlier run; memory if not given.
        scored_exits: Exits whose log-likelihoods are computed in the same pass, for models of these exits with the same
            `store`.
        on_progress: Told after each request.

    Raises:
        InvalidArgumentError: A bad exit layer or batch size, a config with an exit instead of drafts, or no lm-eval.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InvalidArgumentError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
    chosen = writing_config(lm, exit_layer, config)
    require_harness()
    from lm_eval.api.model import TemplateLM

    kind: Any = type("LayerSkipLM", (EngineMethods, TemplateLM), {})
    return kind(
        lm,
        exit_layer,
        config=chosen,
        batch_size=batch_size,
        store=SampleStore() if store is None else store,
        scored_exits=scored_exits,
        on_progress=on_progress,
    )


def require_harness() -> None:
    """Raise `InvalidArgumentError` unless lm-evaluation-harness is there, in a version that we know how to talk to."""
    try:
        import lm_eval.models.utils as utils
        from lm_eval import evaluator  # noqa: F401
        from lm_eval.tasks import TaskManager  # noqa: F401

        missing = [name for name in ("normalize_gen_kwargs", "postprocess_generated_text") if not hasattr(utils, name)]
    except ImportError as error:
        raise InvalidArgumentError(
            f"evaluation needs the package lm-eval ({error}): pip install 'layerskip[eval]'"
        ) from error
    if missing:
        raise InvalidArgumentError("lm-eval is too old: pip install --upgrade 'layerskip[eval]'")


def _cut_like(written: str, text: str) -> str:
    """A text without what follows another in it, which may differ in its leading spaces."""
    start, core = len(written) - len(written.lstrip(" ")), text.lstrip(" ")
    return written[: start + len(core)] if written.startswith(core, start) else written


def _size(group: tuple[tuple[int, ...], dict[str, list[int]]]) -> int:
    context, members = group
    return len(context) + max(map(len, members.values()))
