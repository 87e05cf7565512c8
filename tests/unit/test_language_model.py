"""The front: prompts, sessions, scores."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engines import generate

from layerskip.decoding import scoring
from layerskip.errors import InvalidArgumentError, PromptError
from layerskip.language_model import LanguageModel, Session

OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "exit_layer": 3, "seed": 0}


@pytest.fixture
def tokens_read(text_lm: LanguageModel) -> Iterator[list[int]]:
    """Tokens that enter layer 0, call by call."""
    log: list[int] = []

    def note(start: int, stop: int, num_rows: int, num_queries: int) -> None:
        if start == 0 and stop > 0:
            log.append(num_rows * num_queries)

    text_lm.decoder.calls.observer = note
    yield log
    text_lm.decoder.calls.observer = None


class TestPrompts:
    def test_text_and_ids_are_the_same(self, text_lm: LanguageModel) -> None:
        ids = text_lm.encode(["ab cab"])
        assert ids == [text_lm.tokenizer("ab cab")["input_ids"]]
        assert text_lm.generate(["ab cab"], **OPTIONS)[0].text == text_lm.generate(ids, **OPTIONS)[0].text
        assert text_lm.encode([(2, 3), [4]]) == [[2, 3], [4]]
        assert text_lm.encode([torch.tensor([2, 3])]) == [[2, 3]]

    def test_a_stream_takes_a_single_text(self, text_lm: LanguageModel) -> None:
        (result,) = text_lm.generate(["ab cab"], **OPTIONS)
        stream = text_lm.stream("ab cab", **OPTIONS)
        assert stream.run()[0].token_ids == result.token_ids

    @pytest.mark.parametrize(
        ("prompts", "message"),
        [
            ([], "no prompts"),
            ([""], "prompt 0 is empty"),
            (["a", ""], "prompt 1 is empty"),
            ([[]], "prompt 0 is empty"),
            ([[2], []], "prompt 1 is empty"),
            ([[2, 999]], "token id 999"),
            ([[-1]], "token id -1"),
            ([[2.5]], "prompt 0 must be a text or a list of token ids"),
            ([2, None], "prompt 0 must be a text or a list of token ids"),
            ([None], "prompt 0 must be a text or a list of token ids"),
            (["a" * 500], "the context of 128"),
        ],
    )
    def test_bad_prompts_are_refused(self, text_lm: LanguageModel, prompts: Any, message: str) -> None:
        with pytest.raises(InvalidArgumentError, match=message):
            text_lm.generate(prompts)
        with pytest.raises(InvalidArgumentError, match=message):
            text_lm.stream(prompts)

    def test_generate_takes_a_single_text(self, text_lm: LanguageModel) -> None:
        assert text_lm.generate("ab", **OPTIONS)[0].token_ids == text_lm.generate(["ab"], **OPTIONS)[0].token_ids

    def test_options_are_checked(self, text_lm: LanguageModel) -> None:
        with pytest.raises(InvalidArgumentError, match="unknown option 'max_length'"):
            text_lm.generate(["a"], max_length=3)
        with pytest.raises(InvalidArgumentError, match="temperature"):
            text_lm.stream(["a"], temperature=-1)

    def test_a_seed_is_chosen_and_told(self, text_lm: LanguageModel) -> None:
        options = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 20}
        first, second = (text_lm.generate([[2]], **options)[0] for _ in range(2))
        assert first.seed != second.seed
        assert first.token_ids != second.token_ids
        assert text_lm.generate([[2]], seed=first.seed, **options)[0].token_ids == first.token_ids


class TestSessions:
    """What a session returns is what a call without one returns, only cheaper."""

    FIRST = (5, 6, 7, 2, 3)

    def turn(self, lm: LanguageModel, session: Session, prompt: list[int], **options: Any) -> Any:
        options = {**OPTIONS, **options}
        result = lm.stream([prompt], session=session, **options).run()[0]
        expected = lm.generate([prompt], **options)[0]
        assert (result.token_ids, result.text) == (expected.token_ids, expected.text)
        assert (result.finish_reason, result.stop_reason) == (expected.finish_reason, expected.stop_reason)
        return result

    @pytest.mark.parametrize("second", [{}, {"do_sample": True}, {"generation_strategy": "autoregressive"}])
    def test_a_second_turn_reads_only_what_is_new(
        self, text_lm: LanguageModel, tokens_read: list[int], second: dict[str, Any]
    ) -> None:
        second = {"exit_layer": None if second.get("generation_strategy") else 3, **second}
        session = text_lm.new_session()
        first = self.turn(text_lm, session, [*self.FIRST])
        assert first.stats.cached_tokens == 0
        prompt = [*self.FIRST, *first.token_ids, 8, 9]
        tokens_read.clear()
        result = text_lm.stream([prompt], session=session, **{**OPTIONS, **second}).run()[0]
        assert result.stats.cached_tokens == len(prompt) - 3  # all but the last token of the answer, and the new ones
        assert tokens_read[0] == 3
        assert result.token_ids == text_lm.generate([prompt], **{**OPTIONS, **second})[0].token_ids

    def test_many_turns(self, text_lm: LanguageModel) -> None:
        session, prompt = text_lm.new_session(), [*self.FIRST]
        for turn in range(4):
            result = self.turn(text_lm, session, prompt, do_sample=turn % 2 == 1)
            assert result.stats.cached_tokens == max(0, len(prompt) - 3) * (turn > 0)
            prompt = [*prompt, *result.token_ids, 4, 2 + turn]

    @pytest.mark.parametrize("place", range(1, 12))
    def test_after_an_end_of_sequence(self, text_lm: LanguageModel, place: int) -> None:
        """Also one inside an accepted draft: what lies beyond it is forgotten."""
        plain = text_lm.generate([[*self.FIRST]], **OPTIONS)[0].token_ids
        session = text_lm.new_session()
        result = self.turn(text_lm, session, [*self.FIRST], eos_token_ids=(plain[place],))
        prompt = [*self.FIRST, *result.token_ids, 8]
        again = self.turn(text_lm, session, prompt)
        assert len(prompt) - 2 <= again.stats.cached_tokens <= len(prompt) - 1

    def test_after_a_stop_string(self, text_lm: LanguageModel) -> None:
        text = text_lm.generate([[*self.FIRST]], **OPTIONS)[0].text
        for place in range(len(text) - 1):
            session = text_lm.new_session()
            result = self.turn(text_lm, session, [*self.FIRST], stop=(text[place : place + 2],))
            prompt = [*self.FIRST, *result.token_ids, 8]
            assert self.turn(text_lm, session, prompt).stats.cached_tokens >= len(prompt) - 2

    def test_a_prompt_that_diverges(self, text_lm: LanguageModel) -> None:
        session = text_lm.new_session()
        first = self.turn(text_lm, session, [*self.FIRST])
        prompt = [*self.FIRST, *first.token_ids[:4], 9, 9, 9]
        assert first.token_ids[4] != 9
        assert self.turn(text_lm, session, prompt).stats.cached_tokens == len(prompt) - 3
        assert self.turn(text_lm, session, [9, 9, 9]).stats.cached_tokens == 0

    def test_the_same_prompt_again(self, text_lm: LanguageModel) -> None:
        """One token at least is read: its logits aren't kept."""
        session = text_lm.new_session()
        for cached in (0, 4, 4):
            assert self.turn(text_lm, session, [*self.FIRST]).stats.cached_tokens == cached

    def test_a_shorter_prompt(self, text_lm: LanguageModel) -> None:
        session = text_lm.new_session()
        self.turn(text_lm, session, [*self.FIRST])
        assert self.turn(text_lm, session, [*self.FIRST[:2]]).stats.cached_tokens == 1

    def test_layers_that_an_early_exit_left_out_are_not_taken_for_read(self, text_lm: LanguageModel) -> None:
        session = text_lm.new_session()
        shallow = {"generation_strategy": "early_exit", "exit_layer": 2}
        first = self.turn(text_lm, session, [*self.FIRST], **shallow)
        prompt = [*self.FIRST, *first.token_ids, 8]
        deeper = {"generation_strategy": "early_exit", "exit_layer": 4}
        assert self.turn(text_lm, session, prompt, **deeper).stats.cached_tokens == 0
        assert self.turn(text_lm, session, prompt, **shallow).stats.cached_tokens == len(prompt) - 1
        assert self.turn(text_lm, session, prompt).stats.cached_tokens == 0  # speculation needs all layers

    def test_a_shallow_turn_after_a_deep_one_and_a_deep_one_again(self, text_lm: LanguageModel) -> None:
        session = text_lm.new_session()
        first = self.turn(text_lm, session, [*self.FIRST])
        prompt = [*self.FIRST, *first.token_ids, 8]
        second = self.turn(text_lm, session, prompt, generation_strategy="early_exit", exit_layer=2)
        assert second.stats.cached_tokens > 0
        self.turn(text_lm, session, [*prompt, *second.token_ids, 9])

    @pytest.mark.parametrize("num_events", range(0, 9))
    def test_after_an_interruption(self, text_lm: LanguageModel, num_events: int) -> None:
        session = text_lm.new_session()
        stream = text_lm.stream([[*self.FIRST]], session=session, show_drafts=True, **OPTIONS)
        for _ in range(num_events):
            next(stream)
        (result,) = stream.results()
        self.turn(text_lm, session, [*self.FIRST, *result.token_ids, 8])

    def test_to_the_end_of_the_context(self, text_lm: LanguageModel) -> None:
        session, context = text_lm.new_session(), text_lm.decoder.max_context
        self.turn(text_lm, session, [4, 5] * 40)
        result = self.turn(text_lm, session, [4, 5] * 60, max_new_tokens=500)
        assert len(result.token_ids) == context - 120
        with pytest.raises(PromptError, match="context"):
            text_lm.stream([[4, 5] * 64], session=session)
        assert self.turn(text_lm, session, [4, 5] * 60).stats.cached_tokens == 119  # a refused prompt costs nothing

    def test_as_many_prompts_at_once_as_slots(self, text_lm: LanguageModel) -> None:
        message = r"2 prompts at once need as many slots, and the session has 1; make one with new_session\(slots=2\)"
        with pytest.raises(InvalidArgumentError, match=message):
            text_lm.stream([[2], [3]], session=text_lm.new_session())
        prompts = [[2, 3, 4], [*self.FIRST]]
        found = text_lm.stream(prompts, session=text_lm.new_session(slots=2), **OPTIONS).run()
        assert [result.token_ids for result in found] == [r.token_ids for r in text_lm.generate(prompts, **OPTIONS)]

    @pytest.mark.parametrize("slots", [0, -1, 1.5, True, "2"])
    def test_a_session_has_slots(self, text_lm: LanguageModel, slots: Any) -> None:
        with pytest.raises(InvalidArgumentError, match=f"slots must be .* got {slots!r}"):
            text_lm.new_session(slots=slots)

    @pytest.mark.parametrize("slots", [1, 2, 3])
    def test_conversations_that_take_turns(self, text_lm: LanguageModel, slots: int) -> None:
        """Each finds its own keys and values again, where there are as many slots; else the older ones make room."""
        session = text_lm.new_session(slots=slots)
        prompts = [[*self.FIRST], [9, 8, 7, 6]]
        for turn in range(3):
            for number, prompt in enumerate(prompts):
                result = self.turn(text_lm, session, prompt, num_speculations=2)
                assert (result.stats.cached_tokens > 0) == (turn > 0 and slots > 1)
                assert slots == 1 or result.stats.cached_tokens == max(0, len(prompt) - 3) * (turn > 0)
                prompts[number] = [*prompt, *result.token_ids, 4, 2 + turn]

    def test_the_next_call_ends_a_stream_that_was_left(self, text_lm: LanguageModel) -> None:
        session = text_lm.new_session()
        left = text_lm.stream([[*self.FIRST]], session=session, **OPTIONS)
        told = [next(left).token_id for _ in range(3)]  # type: ignore[union-attr]
        self.turn(text_lm, session, [*self.FIRST, *told, 8])
        (result,) = left.results()
        assert result.finish_reason == "interrupted"
        assert result.token_ids == told
        assert list(left) == []


class TestScores:
    TEXT = (5, 6, 7, 2, 3, 9, 11, 4)

    @pytest.mark.parametrize("exit_layer", [None, 2, 5])
    def test_they_are_the_log_softmax_of_the_logits(self, text_lm: LanguageModel, exit_layer: int | None) -> None:
        logprobs = text_lm.logits(self.TEXT, exit_layer).log_softmax(-1)
        for cut in (1, 4, 7):
            (score,) = text_lm.score([self.TEXT[:cut]], [self.TEXT[cut:]], exit_layer=exit_layer)
            expected = [float(logprobs[i - 1, self.TEXT[i]]) for i in range(cut, len(self.TEXT))]
            assert score.token_logprobs == pytest.approx(expected, abs=1e-5)
            assert score.logprob == pytest.approx(sum(expected), abs=1e-4)
            assert score.token_ids == self.TEXT[cut:]

    def test_without_continuations_a_texts_own_tokens_are_scored(self, text_lm: LanguageModel) -> None:
        assert text_lm.score([self.TEXT]) == text_lm.score([self.TEXT[:1]], [self.TEXT[1:]])

    def test_the_exit_matters(self, text_lm: LanguageModel) -> None:
        scores = [text_lm.score([self.TEXT], exit_layer=e)[0].logprob for e in (1, 2, 5)]
        assert len(set(scores)) == 3
        assert text_lm.score([self.TEXT])[0].logprob == scores[2]

    @pytest.mark.parametrize("exit_layer", [2, 5])
    def test_is_greedy(self, text_lm: LanguageModel, exit_layer: int) -> None:
        options = {"generation_strategy": "early_exit", "exit_layer": exit_layer, "max_new_tokens": 6}
        written = text_lm.generate([[5, 6]], **options)[0].token_ids
        assert text_lm.score([[5, 6]], [written], exit_layer=exit_layer)[0].is_greedy
        for place in (0, 3, 5):
            other = list(written)
            other[place] = (other[place] + 1) % 20
            assert not text_lm.score([[5, 6]], [other], exit_layer=exit_layer)[0].is_greedy

    def test_texts_and_several_rows(self, text_lm: LanguageModel) -> None:
        scores = text_lm.score(["ab", "cab"], [" the", "b"])
        assert [score.token_ids for score in scores] == [tuple(ids) for ids in text_lm.encode([" the", "b"])]
        assert scores[1] == text_lm.score(["cab"], ["b"])[0]

    def test_long_texts_are_read_in_chunks(self, text_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = text_lm.score([self.TEXT[:3]], [self.TEXT[3:]])[0]
        logits = text_lm.logits(self.TEXT)
        for size in (1, 2, 3, 5):
            monkeypatch.setattr(scoring, "PREFILL_CHUNK", size)
            score = text_lm.score([self.TEXT[:3]], [self.TEXT[3:]])[0]
            assert score.token_logprobs == pytest.approx(whole.token_logprobs, abs=1e-4)
            torch.testing.assert_close(text_lm.logits(self.TEXT), logits, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize(
        ("prompts", "continuations", "message"),
        [
            ([[2]], None, r"1 \+ 0 tokens"),
            ([[2], [3]], [[4]], "2 prompts need as many continuations, got 1"),
            ([[2]], [[999]], "token id 999"),
            ([[2]], [[-1]], "token id -1"),
            ([[2, 999]], [[3]], "token id 999"),
            ([[]], [[3]], r"0 \+ 1 tokens"),
            ([[2] * 128], [[3, 3]], "context of 128"),
        ],
    )
    def test_bad_texts_are_refused(
        self, text_lm: LanguageModel, prompts: Any, continuations: Any, message: str
    ) -> None:
        with pytest.raises(PromptError if "need" not in message else InvalidArgumentError, match=message):
            text_lm.score(prompts, continuations)

    def test_bad_exits_are_refused(self, text_lm: LanguageModel) -> None:
        for exit_layer in (0, 6, -1, True, 2.0):
            with pytest.raises(InvalidArgumentError, match="exit_layer"):
                text_lm.score([self.TEXT], exit_layer=exit_layer)
            with pytest.raises(InvalidArgumentError, match="exit_layer"):
                text_lm.logits(self.TEXT, exit_layer)

    def test_logits_take_tensors_of_ids(self, text_lm: LanguageModel) -> None:
        assert torch.equal(text_lm.logits(torch.tensor(self.TEXT)), text_lm.logits(self.TEXT))

    def test_logits_of_bad_ids_are_refused(self, text_lm: LanguageModel) -> None:
        with pytest.raises(PromptError, match="no tokens"):
            text_lm.logits([])
        with pytest.raises(PromptError, match="the text has token id 999; allowed are whole numbers"):
            text_lm.logits([2, 999])
        with pytest.raises(PromptError, match="list of token ids"):
            text_lm.logits([2.5])


def test_prompts_longer_than_a_chunk(text_lm: LanguageModel) -> None:
    prompts = [[4, 5, 6] * 12, [7] * 5, [8, 9] * 9]
    whole = [result.token_ids for result in text_lm.generate(prompts, **OPTIONS)]
    for size in (1, 5, 18):
        assert generate(text_lm.decoder, prompts, prefill_chunk=size, **OPTIONS) == whole
