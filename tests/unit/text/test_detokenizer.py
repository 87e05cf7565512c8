"""Text out of tokens: whole characters only, and stop strings wherever they are cut."""

import random
from collections.abc import Callable
from functools import partial

import pytest
from tiny_tokenizers import byte_fallback, byte_level, slow, unigram, without_transformers, word_piece
from transformers import PreTrainedTokenizerFast

from layerskip.checks import check_text
from layerskip.errors import PromptError
from layerskip.text import detokenizer as text_module
from layerskip.text.detokenizer import REPLACEMENT, WINDOW, Detokenizer, special_tokens
from layerskip.text.stop_strings import StopMatcher
from layerskip.text.tokenizer import Tokenizer


def decode(tokenizer: Tokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class TestDetokenizer:
    @pytest.fixture
    def spell(self, byte_tokenizer: PreTrainedTokenizerFast, piece_ids: dict[bytes, int]):
        """Pieces that a new detokenizer gives for tokens, after a prompt of tokens."""

        def run(pieces: list[bytes], prompt: list[bytes]) -> list[str]:
            detokenizer = Detokenizer(byte_tokenizer, [piece_ids[piece] for piece in prompt])
            return [detokenizer.push(piece_ids[piece]) for piece in pieces]

        return run

    def test_characters_cut_over_tokens_come_whole(self, spell) -> None:
        assert spell([b"\xc3", b"\xa9"], [b"a"]) == ["", "é"]
        assert spell([b"\xe6", b"\x97", b"\xa5", b"b"], [b"a"]) == ["", "", "日", "b"]
        assert spell([b"\xf0\x9f", b"\x98", b"\x80"], [b"a"]) == ["", "", "😀"]

    def test_what_stands_before_half_a_character_does_not_wait(self, spell) -> None:
        assert spell([b"a\xc3", b"\xa9b", b" the"], [b"a"]) == ["a", "éb", " the"]
        assert spell([b" \xf0", b"c"], [b"a"]) == [" ", f"{REPLACEMENT}c"]

    def test_a_character_that_the_prompt_began_is_completed(self, spell) -> None:
        assert spell([b"\xa9", b"b"], [b"a", b"\xc3"]) == ["é", "b"]
        assert spell([b"\x98", b"\x80", b"b"], [b"\xf0\x9f"]) == ["", "😀", "b"]
        assert spell([b"b", b"c"], [b"a", b"\xc3"]) == ["b", "c"]

    def test_spaces_stay(self, spell) -> None:
        assert spell([b" the", b" ", b" the", b"\n"], [b"a"]) == [" the", " ", " the", "\n"]
        assert spell([b" the"], []) == [" the"]

    def test_special_tokens_give_no_text(
        self, byte_tokenizer: PreTrainedTokenizerFast, piece_ids: dict[bytes, int]
    ) -> None:
        detokenizer = Detokenizer(byte_tokenizer, [0])
        tokens = [0, piece_ids[b"a"], 1, piece_ids[b"\xc3"], 0, piece_ids[b"\xa9"], 1]
        assert [detokenizer.push(token) for token in tokens] == ["", "a", "", "", "", "é", ""]

    def test_any_tokens_give_the_whole_text_piece_by_piece(self, byte_tokenizer: PreTrainedTokenizerFast) -> None:
        """Random tokens, most of them invalid bytes: only what may be half a character at the end is left out."""
        choose = random.Random(0)
        halves = 0
        for _ in range(300):
            tokens = choose.choices(range(len(byte_tokenizer)), k=choose.randint(1, 60))
            detokenizer = Detokenizer(byte_tokenizer, [2, 3])
            shown = ""
            for place, token in enumerate(tokens, 1):
                shown += detokenizer.push(token)
                assert shown == decode(byte_tokenizer, tokens[:place]).removesuffix(REPLACEMENT)
            halves += shown != decode(byte_tokenizer, tokens)
        assert halves > 10

    def test_bytes_that_no_character_has_are_given_up(
        self, byte_tokenizer: PreTrainedTokenizerFast, piece_ids: dict[bytes, int]
    ) -> None:
        detokenizer = Detokenizer(byte_tokenizer, [2])
        pieces = [detokenizer.push(piece_ids[piece]) for piece in (b"\x80", b"\x80", b"\xc3", b"\xc3", b"\xa9")]
        assert pieces == ["", REPLACEMENT, REPLACEMENT, REPLACEMENT, "é"]

    def test_peeking_changes_nothing(
        self, byte_tokenizer: PreTrainedTokenizerFast, piece_ids: dict[bytes, int]
    ) -> None:
        detokenizer, other = Detokenizer(byte_tokenizer, [2]), Detokenizer(byte_tokenizer, [2])
        for piece in (b"a", b"\xe6", b"\x97", b"\xa5", b" the"):
            detokenizer.peek([piece_ids[b"b"], piece_ids[b"\xc3"]])
            assert detokenizer.push(piece_ids[piece]) == other.push(piece_ids[piece])
        assert detokenizer.peek([piece_ids[b"\xc3"], piece_ids[b"\xa9"], piece_ids[b"b"]]) == "éb"
        assert detokenizer.peek([piece_ids[b"b"], piece_ids[b"\xc3"]]) == "b"
        assert detokenizer.peek([]) == ""
        detokenizer.push(piece_ids[b"\xc3"])
        assert detokenizer.peek([piece_ids[b"\xa9"]]) == "é"

    def test_special_tokens_between_the_prompt_and_the_text_are_no_context(self) -> None:
        """The first word keeps its space, which a tokenizer takes away where nothing stands before it."""
        tokenizer = byte_fallback("mistral")
        (word,) = tokenizer("the", add_special_tokens=False)["input_ids"]
        assert Detokenizer(tokenizer, [word, *[3] * 50]).push(word) == " the"
        assert Detokenizer(tokenizer, [3] * 50).push(word) == "the"


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "llama 2": partial(byte_fallback, "llama2"),
    "mistral": partial(byte_fallback, "mistral"),
    "gemma": partial(byte_fallback, "gemma"),
    "byte-level": byte_level,
    "word piece": word_piece,
    "unigram": unigram,
    "slow": slow,
    "mistral without transformers": lambda: without_transformers(byte_fallback("mistral")),
    "byte-level without transformers": lambda: without_transformers(byte_level()),
    "unigram without transformers": lambda: without_transformers(unigram()),
}
TEXTS = [
    "hi 😀😀 the thing",
    "  two  spaces,\n\n    four",
    "日本語の文章。 é ü 👩‍👩‍👧 ",
    "שלום עולם, مرحبا بالعالم.",
    " the the\nhi😀",
    "😀" * 12,
]


@pytest.mark.parametrize("kind", TOKENIZERS)
class TestKindsOfTokenizers:
    """The pieces are together what the tokenizer's own decoding adds to the prompt, wherever the prompt ends."""

    @pytest.mark.parametrize("text", TEXTS)
    def test_from_any_place_in_a_text(self, kind: str, text: str) -> None:
        tokenizer = TOKENIZERS[kind]()
        ids = tokenizer.encode(text, add_special_tokens=False)
        whole = decode(tokenizer, ids)
        texts = [decode(tokenizer, ids[:n]) for n in range(len(ids) + 1)]
        complete = [whole.startswith(part) for part in texts]  # not where a character is cut
        for cut in range(len(ids)):
            begun = texts[max(n for n in range(cut + 1) if complete[n])]
            detokenizer = Detokenizer(tokenizer, [1, *ids[:cut]])
            shown = ""
            for place in range(cut, len(ids)):
                shown += detokenizer.push(ids[place])
                assert whole.startswith(begun + shown)
                if complete[place + 1]:
                    assert begun + shown == texts[place + 1]

    def test_in_runs_of_any_length(self, kind: str) -> None:
        """Tokens that come several at a time, or are looked at before, give the same."""
        tokenizer, choose = TOKENIZERS[kind](), random.Random(0)
        ids = tokenizer.encode(" ".join(TEXTS), add_special_tokens=False)
        for _ in range(20):
            one, other = Detokenizer(tokenizer, ids[:9]), Detokenizer(tokenizer, ids[:9])
            rest = ids[9:]
            while rest:
                run, rest = rest[: choose.randint(1, 9)], rest[9:]
                expected = "".join(one.push(token) for token in run)
                assert other.peek(run) == expected
                assert other.push(*run) == expected

    @pytest.mark.parametrize("seed", range(3))
    def test_random_tokens_take_the_same_work_each(self, kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Broken bytes, special tokens and ids without a token, thousands of them: no token is decoded ever again."""
        tokenizer, choose = TOKENIZERS[kind](), random.Random(seed)
        decoded = count_decoded(tokenizer, monkeypatch)
        pools = [range(5), range(len(tokenizer)), range(5, min(200, len(tokenizer)))]
        pools += [[len(tokenizer) + 5]] if kind != "slow" else []  # a slow one doesn't decode ids without a token
        for pool in pools:
            tokens = choose.choices(pool, k=500)
            detokenizer = Detokenizer(tokenizer, tokens[:40])
            decoded.clear()
            for token in tokens:
                detokenizer.push(token)
            assert max(decoded, default=0) <= WINDOW + 1
            assert sum(decoded) <= 500 * (WINDOW + 1)


def count_decoded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens in each call of the tokenizer's decoding."""
    decoded: list[int] = []
    original = text_module._decoder

    def counting(tokenizer: Tokenizer) -> Callable[[list[int]], str]:
        decode_ids = original(tokenizer)

        def count(tokens: list[int]) -> str:
            decoded.append(len(tokens))
            return decode_ids(tokens)

        return count

    monkeypatch.setattr(text_module, "_decoder", counting)
    return decoded


class TestByteFallback:
    @pytest.fixture(params=["llama2", "mistral", "gemma"])
    def spell(self, request: pytest.FixtureRequest):
        """Pieces that a new detokenizer gives for bytes and letters, after a prompt of them."""
        tokenizer = byte_fallback(request.param)

        def ids(pieces: list[str]) -> list[int]:
            found = [tokenizer.convert_tokens_to_ids(f"<0x{piece}>" if len(piece) == 2 else piece) for piece in pieces]
            assert tokenizer.unk_token_id not in found
            return found

        def run(pieces: str, prompt: str) -> list[str]:
            detokenizer = Detokenizer(tokenizer, ids(prompt.split()))
            return [detokenizer.push(token) for token in ids(pieces.split())]

        return run

    def test_emoji_after_a_prompt_that_ends_with_emoji(self, spell) -> None:
        emoji = "F0 9F 98 80"
        assert spell(f"{emoji} {emoji} a", f"a {emoji} {emoji}") == ["", "", "", "😀", "", "", "", "😀", "a"]

    def test_a_broken_byte_harms_no_whole_character(self, spell) -> None:
        assert spell("C3 A9 80 C3 A9 a", "a") == ["", "é", REPLACEMENT, "", "é", "a"]
        assert spell("F0 9F C3 A9", "a") == ["", "", REPLACEMENT, "é"]
        assert spell("F0 9F a", "a") == ["", "", f"{REPLACEMENT}a"]

    def test_a_character_that_the_prompt_began(self, spell) -> None:
        assert spell("98 80 a", "a F0 9F") == ["", "😀", "a"]
        assert spell("98 a", "a F0 9F") == ["", "a"]
        assert spell("a b", "a F0 9F") == ["a", "b"]
        assert spell("C3 A9", "a F0 9F") == ["", "é"]

    def test_line_breaks_are_bytes_too(self, spell) -> None:
        assert spell("0A 0A a ▁ b", "a") == ["\n", "\n", "a", " ", "b"]


def test_a_text_of_whole_characters() -> None:
    check_text("a 😀", "it")
    with pytest.raises(
        PromptError, match=r"prompt 3 has half a character, '.ud83d', at position 2: .*errors='replace'"
    ):
        check_text("a \ud83d b", "prompt 3")


class TestStopMatcher:
    def test_a_stop_string_cut_over_pieces(self) -> None:
        matcher = StopMatcher(["END"])
        assert matcher.push("so E") == ("so ", None)
        assert matcher.push("N") == ("", None)
        assert matcher.push("Dless") == ("", "END")
        assert matcher.flush() == ""

    def test_what_turns_out_to_be_none_is_given(self) -> None:
        matcher = StopMatcher(["END"])
        assert matcher.push("E") == ("", None)
        assert matcher.push("NE") == ("EN", None)
        assert matcher.flush() == "E"
        assert matcher.flush() == ""

    def test_the_earliest_wins(self) -> None:
        assert StopMatcher(["later", "now"]).push("x now, later") == ("x ", "now")
        assert StopMatcher(["now", "later"]).push("x now, later") == ("x ", "now")

    def test_prefixes_that_overlap(self) -> None:
        matcher = StopMatcher(["aab"])
        assert matcher.push("aaa") == ("a", None)
        assert matcher.push("a") == ("a", None)
        assert matcher.push("b") == ("", "aab")
        matcher = StopMatcher(["abab!", "ba?"])
        assert matcher.push("xabab") == ("x", None)
        assert matcher.push("a?") == ("aba", "ba?")

    def test_without_stops_nothing_is_held(self) -> None:
        matcher = StopMatcher([])
        assert matcher.push("anything") == ("anything", None)
        assert matcher.flush() == ""

    def test_any_pieces(self) -> None:
        """Against `str.find` on the text so far: the first piece that completes a stop ends the text before it."""
        choose = random.Random(1)
        found_any = 0
        for _ in range(3000):
            stops = ["".join(choose.choices("ab", k=choose.randint(1, 4))) for _ in range(choose.randint(1, 3))]
            pieces = ["".join(choose.choices("abc", k=choose.randint(0, 3))) for _ in range(8)]
            matcher, given, text = StopMatcher(stops), "", ""
            for piece in pieces:
                text += piece
                certain, stop = matcher.push(piece)
                given += certain
                places = [text.find(s) for s in stops if s in text]
                assert (stop is not None) == bool(places)
                if places:
                    assert given == text[: min(places)]
                    assert text.startswith(stop, min(places))
                    found_any += 1
                    break
                assert text.startswith(given)
                held = text[len(given) :]  # no more is held than may begin a stop string
                assert held == "" or any(s.startswith(held) and s != held for s in stops)
            else:
                assert given + matcher.flush() == text
        assert 500 < found_any < 2950


class TestSpecialTokensAsStopStrings:
    SPECIAL = {3: "<|im_start|>", 4: "<|im_end|>", 5: "<|im_end|>\n"}  # noqa: RUF012

    def run(self, stops: list[str], stream: list[int | str]) -> tuple[str, str | None]:
        """What is shown of pieces and special tokens, and the stop string that ends it."""
        matcher, shown = StopMatcher(stops, self.SPECIAL), ""
        for item in stream:
            certain, stop = matcher.push(matcher.marks.get(item, "") if isinstance(item, int) else item)
            shown += certain
            if stop is not None:
                return shown, stop
        return shown + matcher.flush(), None

    @pytest.mark.parametrize("others", [[], ["END"], ["<|im_start|>", "x"]])
    def test_the_token_and_its_letters_both_stop(self, others: list[str]) -> None:
        for stops in ([*others, "<|im_end|>"], ["<|im_end|>", *others]):
            assert self.run(stops, ["a", " b", 4, "c"]) == ("a b", "<|im_end|>")
            assert self.run(stops, ["a b<|im", "_end", "|>c"]) == ("a b", "<|im_end|>")

    def test_mixed_with_text(self) -> None:
        stop = "\n<|im_end|>\n<|im_start|>user"
        assert self.run([stop], ["a\n", 4, "\n", 3, "us", "er", "b"]) == ("a", stop)
        assert self.run([stop], ["a\n", 4, "\n<|im_start|>", "user"]) == ("a", stop)
        assert self.run([stop], ["a\n", 4, "\n", 3, "assistant"]) == ("a\n\nassistant", None)
        assert self.run(["<|im_end|>\n"], ["a", 5, "b"]) == ("a", "<|im_end|>\n")
        assert self.run(["<|im_end|>\n"], ["a", 4, "\nb"]) == ("a", "<|im_end|>\n")

    def test_other_stop_strings_see_the_shown_text(self) -> None:
        assert self.run(["hello", "?<|im_end|>"], ["hel", 4, "lo!"]) == ("", "hello")
        assert self.run(["|>", "<"], ["a", 4, "b"]) == ("ab", None)  # not within a token that gives no text

    def test_the_earliest_wins(self) -> None:
        assert self.run(["b", "<|im_end|>"], ["a", 4, "b"]) == ("a", "<|im_end|>")
        assert self.run(["<|im_end|>", "b"], ["ab", 4]) == ("a", "b")

    def test_nothing_of_a_stop_string_is_shown(self) -> None:
        matcher = StopMatcher(["bc<|im_end|>d"], self.SPECIAL)
        end = matcher.marks[4]
        assert [matcher.push(piece) for piece in ("ab", "c", end)] == [("a", None), ("", None), ("", None)]
        assert matcher.push("e") == ("bce", None)
        assert [matcher.push(piece) for piece in ("bc", end, "d!")] == [("", None), ("", None), ("", "bc<|im_end|>d")]

    def test_tokens_that_no_stop_string_names_leave_no_mark(self) -> None:
        assert StopMatcher(["x"], self.SPECIAL).marks == {}
        assert set(StopMatcher(["a<|im_end|>"], self.SPECIAL).marks) == {4}

    def test_a_long_row_of_tokens(self) -> None:
        """Every token may be spelled with letters; not all combinations of hundreds are looked for."""
        stop = "<|im_end|>" * 200
        assert self.run([stop], ["a", *[4] * 200]) == ("a", stop)
        assert self.run([stop], ["a", stop]) == ("a", stop)

    @pytest.mark.parametrize("kind", TOKENIZERS)
    def test_what_tokenizers_call_special(self, kind: str) -> None:
        tokenizer = TOKENIZERS[kind]()
        found = special_tokens(tokenizer)
        (end,) = tokenizer.convert_tokens_to_ids(["</s>"])
        assert found[end] == "</s>"
        assert all(decode(tokenizer, [token]) == "" for token in found)
