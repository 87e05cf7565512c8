"""Text out of tokens: whole characters only, and stop strings wherever they are cut."""

import random

import pytest
from transformers import PreTrainedTokenizerFast

from layerskip.decoding.text import REPLACEMENT, Detokenizer, StopMatcher


def decode(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> str:
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

    def test_what_stands_before_half_a_character_waits_with_it(self, spell) -> None:
        assert spell([b"a\xc3", b"\xa9b", b" the"], [b"a"]) == ["", "aéb", " the"]
        assert spell([b" \xf0", b"c"], [b"a"]) == ["", f" {REPLACEMENT}c"]

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
        """Random tokens, most of them invalid bytes: nothing is lost but an incomplete character at the end."""
        choose = random.Random(0)
        halves = 0
        for _ in range(200):
            tokens = choose.choices(range(len(byte_tokenizer)), k=choose.randint(1, 30))
            detokenizer = Detokenizer(byte_tokenizer, [2, 3])
            pieces = [detokenizer.push(token) for token in tokens]
            assert not any(piece.endswith(REPLACEMENT) for piece in pieces)
            whole = decode(byte_tokenizer, tokens)
            assert whole.startswith("".join(pieces))
            assert "".join(pieces) + detokenizer.flush() == whole.rstrip(REPLACEMENT)
            assert detokenizer.flush() == ""
            halves += whole.endswith(REPLACEMENT)
        assert halves > 10

    def test_the_end_of_a_text_keeps_what_stands_before_half_a_character(
        self, byte_tokenizer: PreTrainedTokenizerFast, piece_ids: dict[bytes, int]
    ) -> None:
        detokenizer = Detokenizer(byte_tokenizer, [2])
        assert detokenizer.push(piece_ids[b"a\xc3"]) == ""
        assert detokenizer.flush() == "a"

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

    def test_only_the_end_of_a_prompt_is_read(self, byte_tokenizer: PreTrainedTokenizerFast) -> None:
        read: list[int] = []

        class Spy:
            def decode(self, tokens: list[int], **options: bool) -> str:
                read.append(len(tokens))
                return decode(byte_tokenizer, tokens)

        detokenizer = Detokenizer(Spy(), [2] * 10_000)
        for _ in range(50):
            assert detokenizer.push(3) == "b"
        assert max(read) < 10


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
