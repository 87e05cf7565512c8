"""Events and results: text, sources, stop strings, interruption."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from layerskip import DraftEvent, FinishEvent, GenerationResult, GenerationStream, TokenEvent
from layerskip.decoding import engine
from layerskip.language_model import LanguageModel
from layerskip.text.detokenizer import REPLACEMENT

PROMPTS = [[9], [2, 3, 4], [5, 6, 7, 2, 3]]
SPECULATIVE: dict[str, Any] = {"max_new_tokens": 40, "exit_layer": 3, "num_speculations": 3, "seed": 0}


def text_of(events: list[Any], index: int) -> str:
    return "".join(event.text for event in events if event.index == index and not isinstance(event, DraftEvent))


def settled(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> str:
    """Text of tokens, without what may be half a character at its end."""
    return tokenizer.decode(tokens, skip_special_tokens=True).removesuffix(REPLACEMENT)


def results_of(events: list[Any]) -> dict[int, GenerationResult]:
    return {event.index: event.result for event in events if isinstance(event, FinishEvent)}


MODES: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "seed": 1},
    {"do_sample": True, "seed": 1, "acceptance": "rejection"},
    {"generation_strategy": "autoregressive", "exit_layer": None},
]


@pytest.mark.parametrize("show_drafts", [False, True])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_events_add_up_to_the_results(
    text_lm: LanguageModel, byte_tokenizer: PreTrainedTokenizerFast, mode: dict[str, Any], show_drafts: bool
) -> None:
    options = {**SPECULATIVE, **mode}
    stream = text_lm.stream(PROMPTS, show_drafts=show_drafts, **options)
    events = list(stream)
    results = results_of(events)
    assert sorted(results) == [0, 1, 2]
    for index, expected in enumerate(text_lm.generate(PROMPTS, **options)):
        result = results[index]
        assert (result.text, result.token_ids, result.seed) == (expected.text, expected.token_ids, expected.seed)
        assert text_of(events, index) == result.text
        assert result.text == settled(byte_tokenizer, result.token_ids)
        assert [e.token_id for e in events if isinstance(e, TokenEvent) and e.index == index] == result.token_ids
        assert [r.token_ids for r in stream.results()][index] == result.token_ids
        own = [event for event in events if event.index == index]
        assert isinstance(own[-1], FinishEvent)
    assert any(isinstance(event, DraftEvent) for event in events) == (
        show_drafts and options.get("generation_strategy") != "autoregressive"
    )


def rounds(events: list[Any], index: int) -> list[tuple[tuple[int, ...], list[TokenEvent]]]:
    """Drafts of each round of one prompt, with the tokens that followed; a round without drafts gives one token."""
    _first, *own = [event for event in events if event.index == index and not isinstance(event, FinishEvent)]
    found: list[tuple[tuple[int, ...], list[TokenEvent]]] = []
    for event in own:
        if isinstance(event, DraftEvent):
            found.append((event.token_ids, []))
        elif event.source == "decoded":
            found.append(((), [event]))
        else:
            found[-1][1].append(event)
    return found


@pytest.mark.parametrize("mode", MODES[:3], ids=str)
def test_sources_say_what_became_of_the_drafts(text_lm: LanguageModel, mode: dict[str, Any]) -> None:
    events = list(text_lm.stream(PROMPTS, show_drafts=True, **{**SPECULATIVE, **mode}))
    seen = set()
    for index, result in results_of(events).items():
        accepted = [0] * 3
        drafted = [0] * 3
        for drafts, tokens in rounds(events, index):
            *kept, last = tokens
            assert [token.token_id for token in kept] == list(drafts[: len(kept)])
            assert {token.source for token in kept} <= {"accepted"}
            if not drafts:
                assert last.source == "decoded"
            elif len(kept) == len(drafts):
                assert last.source == "bonus"
            else:
                assert last.source == "corrected"
                assert mode.get("acceptance") == "rejection" or last.token_id != drafts[len(kept)]
            for i in range(len(drafts)):
                drafted[i] += 1
                accepted[i] += i < len(kept)
            seen |= {token.source for token in tokens}
        stats = result.stats
        assert (stats.drafted_by_position, stats.accepted_by_position) == (tuple(drafted), tuple(accepted))
        assert (stats.drafted, stats.accepted) == (sum(drafted), sum(accepted))
        assert stats.acceptance_rate == pytest.approx(sum(accepted) / sum(drafted))
        num_rounds = len(rounds(events, index))
        assert stats.rounds == num_rounds
        assert stats.mean_accepted_length == pytest.approx((len(result.token_ids) - 1) / num_rounds)
    assert seen >= {"accepted", "corrected", "bonus"}
    firsts = [next(e for e in events if isinstance(e, TokenEvent) and e.index == i) for i in range(3)]
    assert {event.source for event in firsts} == {"decoded"}  # the prompt's own token


def test_drafts_come_with_their_text(text_lm: LanguageModel, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    """What was shown and a draft's text are together the text of all these tokens, but for half a character."""
    for prompt in PROMPTS:
        shown, tokens = "", []
        for event in text_lm.stream([prompt], show_drafts=True, **SPECULATIVE):
            if isinstance(event, DraftEvent):
                assert shown + event.text == settled(byte_tokenizer, [*tokens, *event.token_ids])
            elif isinstance(event, TokenEvent):
                shown, tokens = shown + event.text, [*tokens, event.token_id]


@pytest.mark.parametrize("mode", MODES[:3], ids=str)
def test_showing_drafts_changes_nothing(text_lm: LanguageModel, mode: dict[str, Any]) -> None:
    """The same rounds run, with the same tokens."""
    shown, hidden = (
        list(text_lm.stream(PROMPTS, show_drafts=show, **{**SPECULATIVE, **mode})) for show in (True, False)
    )
    assert [event for event in shown if isinstance(event, TokenEvent)] == [
        event for event in hidden if isinstance(event, TokenEvent)
    ]
    ours, theirs = results_of(shown), results_of(hidden)
    assert [ours[i].stats.rounds for i in range(3)] == [theirs[i].stats.rounds for i in range(3)]
    assert [ours[i].stats.layer_calls for i in range(3)] == [theirs[i].stats.layer_calls for i in range(3)]


@pytest.fixture(scope="module")
def full(text_lm: LanguageModel) -> str:
    """What the network writes after the first prompt."""
    return text_lm.generate([PROMPTS[0]], max_new_tokens=40, generation_strategy="autoregressive")[0].text


class TestStopStrings:
    def test_the_same_whatever_the_strategy(self, text_lm: LanguageModel, full: str) -> None:
        """Every substring of the text as a stop string: some straddle tokens, some lie inside accepted drafts."""
        endings = set()
        for start, size in itertools.product(range(2, len(full) - 4, 3), (1, 2, 4)):
            stop = full[start : start + size]
            options = {"max_new_tokens": 40, "stop": (stop,)}
            (plain,) = text_lm.generate([PROMPTS[0]], generation_strategy="autoregressive", **options)
            assert plain.text == full[: full.find(stop)]
            assert (plain.finish_reason, plain.stop_reason) == ("stop", stop)
            (result,) = text_lm.generate([PROMPTS[0]], **{**SPECULATIVE, **options})
            assert (result.text, result.token_ids) == (plain.text, plain.token_ids)
            assert (result.finish_reason, result.stop_reason) == ("stop", stop)
            assert result.stats.tokens == len(result.token_ids)
            endings.add(len(result.token_ids))
        assert len(endings) > 5

    def test_drafts_beyond_a_stop_string_do_not_count(self, text_lm: LanguageModel, full: str) -> None:
        """Statistics agree with the events where a stop string cuts a round."""
        cut = 0
        for start in range(0, len(full) - 3):
            stop = full[start : start + 2]
            events = list(text_lm.stream([PROMPTS[0]], stop=(stop,), show_drafts=True, **SPECULATIVE))
            (result,) = results_of(events).values()
            accepted = [e for e in events if isinstance(e, TokenEvent) and e.source == "accepted"]
            assert result.stats.accepted == len(accepted)
            cut += any(tokens[-1].source == "accepted" for _, tokens in rounds(events, 0)[-1:])
        assert cut > 3

    def test_several(self, text_lm: LanguageModel, full: str) -> None:
        late, early = full[20:23], full[6:8]
        assert full.find(early) < full.find(late)
        for stops in ((late, early), (early, late), (late, "never", early)):
            (result,) = text_lm.generate([PROMPTS[0]], stop=stops, **SPECULATIVE)
            assert (result.text, result.stop_reason) == (full[: full.find(early)], early)

    def test_held_back_text_comes_at_the_end(self, text_lm: LanguageModel, full: str) -> None:
        """A stop string that the text only begins: its beginning isn't lost."""
        stop = full[-2:] + "never"
        events = list(text_lm.stream([PROMPTS[0]], stop=(stop,), **SPECULATIVE))
        (result,) = results_of(events).values()
        assert result.text == text_of(events, 0) == full
        assert events[-1].text.endswith(full[-2:])
        assert result.finish_reason == "length"

    def test_each_row_of_a_batch_has_its_own(self, text_lm: LanguageModel, full: str) -> None:
        options = {**SPECULATIVE, "stop": (full[9:11],)}
        alone = [text_lm.generate([prompt], **options)[0] for prompt in PROMPTS]
        together = text_lm.generate(PROMPTS, **options)
        assert [(r.text, r.token_ids, r.stop_reason) for r in together] == [
            (r.text, r.token_ids, r.stop_reason) for r in alone
        ]
        assert together[0].finish_reason == "stop"

    def test_text_events_never_show_a_part_of_it(self, text_lm: LanguageModel, full: str) -> None:
        stop = full[9:13]
        for event in (shown := []) or text_lm.stream([PROMPTS[0]], stop=(stop,), **SPECULATIVE):
            shown.append(event.text)
            assert full[: full.find(stop)].startswith("".join(shown))


class TestInterruption:
    @pytest.fixture
    def interrupt_at(self, text_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
        """Makes the n-th call of a decoding function raise KeyboardInterrupt, as Ctrl-C does."""

        def set_up(name: str, number: int) -> None:
            owner: Any = engine if name in ("read_chunk", "run_rounds") else type(text_lm.decoder)
            original, calls = getattr(owner, name), itertools.count(1)

            def raising(*arguments: Any, **options: Any) -> Any:
                if next(calls) == number:
                    raise KeyboardInterrupt
                return original(*arguments, **options)

            monkeypatch.setattr(owner, name, raising)
            monkeypatch.setitem(engine.Engine.__init__.__kwdefaults__, "lease_seconds", 0.0)  # one call a round

        return set_up

    @pytest.mark.parametrize("place", [("run_rounds", 3), ("rounds", 3), ("read_chunk", 1)])
    @pytest.mark.parametrize("strategy", [{}, {"generation_strategy": "autoregressive", "exit_layer": None}], ids=str)
    def test_ctrl_c_while_decoding_ends_the_stream(
        self,
        text_lm: LanguageModel,
        interrupt_at: Callable[[str, int], None],
        place: tuple[str, int],
        strategy: dict[str, Any],
    ) -> None:
        options = {**SPECULATIVE, **strategy}
        full = [result.token_ids for result in text_lm.generate(PROMPTS, **options)]
        interrupt_at(*place)
        stream = text_lm.stream(PROMPTS, **options)
        events = list(stream)
        results = results_of(events)
        assert sorted(results) == [0, 1, 2]
        for index, result in results.items():
            assert (result.finish_reason, result.stop_reason) == ("interrupted", None)
            assert result.token_ids == full[index][: len(result.token_ids)]
            assert [e.token_id for e in events if isinstance(e, TokenEvent) and e.index == index] == result.token_ids
            assert text_of(events, index) == result.text
            assert result.stats.tokens == len(result.token_ids)
        assert all(bool(result.token_ids) == (place[0] != "read_chunk") for result in results.values())
        assert list(stream) == []

    def test_rows_that_had_ended_keep_their_reason(
        self, text_lm: LanguageModel, interrupt_at: Callable[[str, int], None]
    ) -> None:
        eos = text_lm.generate([PROMPTS[0]], **SPECULATIVE)[0].token_ids[0]
        interrupt_at("rounds", 2)
        results = results_of(list(text_lm.stream(PROMPTS[:2], eos_token_ids=(eos,), **SPECULATIVE)))
        assert [results[i].finish_reason for i in range(2)] == ["stop", "interrupted"]

    @pytest.mark.parametrize("num_events", [0, 1, 2, 3, 4, 6, 9, 12])
    def test_ctrl_c_in_the_callers_loop(self, text_lm: LanguageModel, num_events: int) -> None:
        """The results hold exactly what the events told, also if they end in the middle of a round."""
        full = [result.token_ids for result in text_lm.generate(PROMPTS, **SPECULATIVE)]
        stream = text_lm.stream(PROMPTS, **SPECULATIVE)
        events = list(itertools.islice(stream, num_events))
        for index, result in enumerate(stream.results()):
            told = [e.token_id for e in events if isinstance(e, TokenEvent) and e.index == index]
            assert result.token_ids == told == full[index][: len(told)]
            assert result.finish_reason == "interrupted"
            assert result.text.startswith(text_of(events, index))
            assert result.stats.accepted == sum(
                isinstance(e, TokenEvent) and e.index == index and e.source == "accepted" for e in events
            )
        assert list(stream) == []  # nothing comes after the results

    def test_interrupted_between_the_tokens_of_a_last_round(self, text_lm: LanguageModel) -> None:
        """The row has ended by its length, but not all of its tokens have been told."""
        events: list[Any] = []
        stream = text_lm.stream([PROMPTS[0]], **{**SPECULATIVE, "exit_layer": 5, "max_new_tokens": 5})
        events = list(itertools.islice(stream, 3))
        (result,) = stream.results()
        assert result.token_ids == [event.token_id for event in events]
        assert result.finish_reason == "interrupted"

    def test_generate_lets_it_through(self, text_lm: LanguageModel, interrupt_at: Callable[[str, int], None]) -> None:
        interrupt_at("rounds", 2)
        with pytest.raises(KeyboardInterrupt):
            text_lm.generate(PROMPTS, **SPECULATIVE)


def test_other_exceptions_are_not_swallowed(text_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(type(text_lm.decoder), "rounds", broken)
    with pytest.raises(RuntimeError, match="broken"):
        list(text_lm.stream([PROMPTS[0]], **SPECULATIVE))


def test_nothing_is_computed_before_the_first_event(text_lm: LanguageModel) -> None:
    calls = text_lm.decoder.layer_calls
    stream = text_lm.stream([PROMPTS[0]], **SPECULATIVE)
    assert isinstance(stream, GenerationStream)
    assert text_lm.decoder.layer_calls == calls
    next(stream)
    assert text_lm.decoder.layer_calls == calls + 5


def test_without_a_tokenizer_ids_come_without_text(tiny_checkpoint: Callable[..., Any]) -> None:
    import layerskip

    lm = layerskip.load(str(tiny_checkpoint()), dtype="float32", device="cpu")
    events = list(lm.stream([[1, 2]], max_new_tokens=6, show_drafts=True))
    assert {event.text for event in events} == {""}
    assert len(events[-1].result.token_ids) == 6
    with pytest.raises(layerskip.errors.TokenizerError):
        lm.generate([[1, 2]], stop=("x",))
    with pytest.raises(layerskip.errors.TokenizerError):
        lm.generate(["text"])
