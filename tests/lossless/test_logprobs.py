"""Log-probabilities of tokens that are generated, and of those of prompts: the model's own, however it decodes."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from constraints import Maze
from engines import drain, start

from layerskip.decoding.event import Event
from layerskip.decoding.output.events import FinishEvent, TokenEvent
from layerskip.decoding.row import Row
from layerskip.decoding.rules import logprobs as logprobs_module
from layerskip.decoding.rules.logprobs import TokenLogprobs
from layerskip.language_model import LanguageModel

CLOSE = 1e-4
RULES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_k": 9, "seed": 4},
    {"temperature": 1.2, "seed": 4, "acceptance": "rejection"},
    {"frequency_penalty": 1.0, "logit_bias": {5: 3.0}, "repetition_penalty": 1.3},
]
WAYS: list[dict[str, Any]] = [
    {"generation_strategy": "autoregressive"},
    {"exit_layer": 2, "num_speculations": 4},
    {"exit_layer": 5, "num_speculations": 3},
    {"generation_strategy": "ngram", "num_speculations": 3},
    {"generation_strategy": "adaptive"},
]


def check(lm: LanguageModel, tokens: Sequence[int], first: int, told: Sequence[TokenLogprobs | None], top: int) -> None:
    """Hold what was told of tokens[first:] against the logits of the whole text."""
    expected = lm.logits(list(tokens)).log_softmax(-1)
    assert len(told) == len(tokens) - first
    for place, each in enumerate(told, start=first):
        assert each is not None
        row = expected[place - 1]
        assert each.logprob == pytest.approx(float(row[tokens[place]]), abs=CLOSE)
        assert len(each.top) == top
        best = row.topk(top).values.tolist() if top else []
        assert [logprob for _, logprob in each.top] == pytest.approx(best, abs=CLOSE)
        for token, logprob in each.top:
            assert logprob == pytest.approx(float(row[token]), abs=CLOSE)


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("top", [0, 5])
def test_generated_tokens(
    lm: LanguageModel, prompts: list[list[int]], way: dict[str, Any], rules: dict[str, Any], top: int
) -> None:
    results = lm.generate(prompts, max_new_tokens=20, logprobs=top, **way, **rules)
    for prompt, result in zip(prompts, results, strict=True):
        assert result.logprobs is not None
        assert result.prompt_logprobs is None
        check(lm, [*prompt, *result.token_ids], len(prompt), result.logprobs, top)
    plain = lm.generate(prompts, max_new_tokens=20, **way, **rules)
    if rules.get("acceptance") != "rejection" or way != WAYS[-1]:  # whose plans depend on measured times
        assert [result.token_ids for result in plain] == [result.token_ids for result in results]
    assert plain[0].logprobs is None


def test_only_rows_that_ask_are_told(lm: LanguageModel, prompts: list[list[int]]) -> None:
    from layerskip.decoding.config import GenerationConfig

    shared = {"repetition_penalty": 1.2, "exit_layer": 2, "max_new_tokens": 12}
    numbers = (None, 0, 3)
    requests = [
        lm.request(prompt, GenerationConfig(logprobs=number, **shared), seed=0)
        for prompt, number in zip(prompts, numbers, strict=True)
    ]
    results = lm.start(requests).run()
    assert [result.logprobs is None for result in results] == [True, False, False]
    for prompt, result, number in list(zip(prompts, results, numbers, strict=True))[1:]:
        assert result.logprobs is not None
        check(lm, [*prompt, *result.token_ids], len(prompt), result.logprobs, number or 0)


def test_the_exits_own_where_only_first_layers_run(lm: LanguageModel, prompts: list[list[int]]) -> None:
    options = {"generation_strategy": "early_exit", "exit_layer": 2, "max_new_tokens": 10, "logprobs": 2}
    (result,) = lm.generate([prompts[1]], **options)
    assert result.logprobs is not None
    tokens = [*prompts[1], *result.token_ids]
    expected = lm.logits(tokens, 2).log_softmax(-1)
    for place, told in enumerate(result.logprobs, start=len(prompts[1])):
        assert told.logprob == pytest.approx(float(expected[place - 1, tokens[place]]), abs=CLOSE)


def test_events_tell_of_kept_tokens_only(lm: LanguageModel, prompts: list[list[int]]) -> None:
    """An end token amid accepted drafts cuts what is told, as it cuts the tokens."""
    full = lm.generate([prompts[1]], max_new_tokens=30)[0].token_ids
    for end in dict.fromkeys(full[3:12]):
        options = {"max_new_tokens": 30, "eos_token_ids": (end,), "exit_layer": 4, "num_speculations": 6}
        engine = start(lm.decoder, [prompts[1]], logprobs=1, **options)
        events: list[Event] = drain(engine)
        assert all(len(event.logprobs) == len(event.tokens) for event in events)
        tokens = [token for event in events for token in event.tokens]
        check(lm, [*prompts[1], *tokens], len(prompts[1]), [each for event in events for each in event.logprobs], 1)


def test_streams_tell_token_by_token(lm: LanguageModel, prompts: list[list[int]]) -> None:
    events = list(lm.stream(prompts, max_new_tokens=9, logprobs=1, exit_layer=2))
    for index, prompt in enumerate(prompts):
        tokens = [event for event in events if isinstance(event, TokenEvent) and event.index == index]
        told = [event.logprobs for event in tokens]
        check(lm, [*prompt, *(event.token_id for event in tokens)], len(prompt), told, 1)
        (end,) = [event for event in events if isinstance(event, FinishEvent) and event.index == index]
        assert end.result.logprobs == tuple(told)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_constraints_do_not_change_what_is_told(
    lm: LanguageModel, prompts: list[list[int]], way: dict[str, Any]
) -> None:
    """They are the model's own log-probabilities, before a mask."""
    maze = Maze(1, 48)
    engine = start(lm.decoder, [prompts[1]], constraints=[maze], logprobs=3, max_new_tokens=20, **way)
    (row,) = engine.rows
    drain(engine)
    check(lm, row.tokens, len(prompts[1]), row.logprobs, 3)


class TestPrompts:
    def told(self, lm: LanguageModel, prompts: list[list[int]], number: int, **options: Any) -> list[Row]:
        engine = start(lm.decoder, prompts, prompt_logprobs=number, max_new_tokens=2, **options)
        rows = engine.rows
        drain(engine)
        return rows

    @pytest.mark.parametrize("chunk", [1, 4, 1024])
    @pytest.mark.parametrize("number", [0, 4])
    def test_every_token(
        self,
        lm: LanguageModel,
        prompts: list[list[int]],
        chunk: int,
        number: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Whatever number of tokens is read, and of positions unembedded, at once."""
        from layerskip.decoding.rounds import telling

        monkeypatch.setattr(telling, "UNEMBED_CHUNK", 3)
        for row in self.told(lm, prompts, number, prefill_chunk=chunk, exit_layer=2):
            assert row.prompt_logprobs[0] is None
            check(lm, row.request.tokens, 1, row.prompt_logprobs[1:], number)

    def test_equal_those_of_scoring(self, lm: LanguageModel, prompts: list[list[int]]) -> None:
        for prompt in prompts[1:]:
            (score,) = lm.score([prompt])
            (row,) = self.told(lm, [prompt], 0)
            told = [each.logprob for each in row.prompt_logprobs[1:] if each is not None]
            assert told == pytest.approx(score.token_logprobs, abs=CLOSE)

    def test_no_prefix_is_reused(self, lm: LanguageModel) -> None:
        from layerskip.decoding.config import GenerationConfig

        prompt, config = [(5 * i) % 48 for i in range(40)], GenerationConfig(max_new_tokens=3)
        session = lm.new_session()
        lm.start([lm.request(prompt, config, seed=0)], session=session).run()
        (again,) = lm.start([lm.request(prompt, config, seed=0)], session=session).run()
        assert again.stats.cached_tokens == len(prompt) - 1
        request = lm.request(prompt, config, seed=0, prompt_logprobs=1)
        (result,) = lm.start([request], session=session).run()
        assert result.stats.cached_tokens == 0
        assert result.token_ids == again.token_ids
        assert result.prompt_logprobs is not None
        check(lm, prompt, 1, result.prompt_logprobs[1:], 1)
        (after,) = lm.start([lm.request(prompt, config, seed=0)], session=session).run()
        assert after.stats.cached_tokens == len(prompt) - 1


def test_equals_come_in_the_order_of_their_ids() -> None:
    logits = torch.tensor([[1.0, 3.0, 1.0, 3.0, 1.0, -torch.inf], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    first, second = logprobs_module.token_logprobs(logits, [0, 5], 4)
    assert [token for token, _ in first.top] == [1, 3, 0, 2]
    assert [token for token, _ in second.top] == [0, 1, 2, 3]
    everything, _ = logprobs_module.token_logprobs(logits, [0, 5], 20)
    assert [token for token, _ in everything.top] == [1, 3, 0, 2, 4]  # the last has no chance
    assert logprobs_module.token_logprobs(logits[:0], [], 3) == []


def test_kernels_agree(make_lm: Callable[..., LanguageModel], prompts: list[list[int]]) -> None:
    told = []
    for kernels in ("torch", "native"):
        results = make_lm(kernels=kernels).generate(prompts, max_new_tokens=12, logprobs=0, exit_layer=3)
        told.append([each.logprob for result in results for each in result.logprobs or ()])
    assert told[0] == pytest.approx(told[1], abs=CLOSE)
