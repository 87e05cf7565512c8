r"""How byte-level BPE tokenizers cut text into words before they merge, by `tokenizer.ggml.pre`.

A GGUF file names only the way, and every reader has a table of what the name means. The expressions here are those of
the models' own tokenizer.json files, which the models were trained with. llama.cpp's table is the same but for
what its engine for regular expressions can't express: in `tekken` and `gpt-4o` it knows no case and no marks beyond
ASCII. It doesn't normalise either, as Qwen's tokenizers do. `benchmarks/gguf_tokenizers.py` counts what that comes to.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from layerskip.errors import TokenizerError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_SIGNS}|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
)
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_DEEPSEEK_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"""
) + _SPACES
_CASED_ALPHABETS = (  # letters that have a case, listed by code point in DeepSeek LLM's tokenizer.json
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ"
    "\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿ"
    "ﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_IDEOGRAPHS_AND_HANGUL = "[一-龥\u0800-一가-\ud7ff]+"


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """One way to cut text into words."""

    names: tuple[str, ...]
    """What `tokenizer.ggml.pre` calls it."""
    splits: tuple[str, ...]
    """Regular expressions, one after the other: each cuts what it matches out of what the one before left."""
    whole_words: bool = False
    """Whether a word that is a token becomes that token, whatever the merges say."""
    adds_bos: bool = False
    """Whether a text gets the beginning-of-sequence token where the file doesn't say."""
    composes: bool = False
    """Whether the text is normalised first: characters and their marks composed where Unicode can (NFC)."""


_PRE_TOKENIZERS = (
    PreTokenizer(names=("default",), splits=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    PreTokenizer(
        names=(
            "gpt-2",
            "phi-2",
            "olmo",
            "mpt",
            "jais",
            "exaone4",
            "trillion",
            "granite-docling",
            "gigachat",
            "a.x-4.0",
            "mellum",
        ),
        splits=(_GPT2,),
    ),
    PreTokenizer(
        names=("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        splits=(r"\p{N}", _GPT2),
    ),
    PreTokenizer(
        names=("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        splits=(_LLAMA3,),
        whole_words=True,
        adds_bos=True,
    ),
    PreTokenizer(names=("dbrx", "smaug-bpe", "chatglm-bpe"), splits=(_LLAMA3,)),
    PreTokenizer(names=("glm4",), splits=(_LLAMA3,), whole_words=True),
    PreTokenizer(names=("qwen2",), splits=(_QWEN2,), composes=True),
    PreTokenizer(
        names=("deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "kormo", "grok-2", "solar-open"), splits=(_QWEN2,)
    ),
    PreTokenizer(
        names=("qwen35",),
        splits=(
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|"
            + _SPACES,
        ),
        composes=True,
    ),
    PreTokenizer(
        names=("tekken",),
        splits=(rf"{_CASED_WORDS[0]}|{_CASED_WORDS[1]}|\p{{N}}|{_PATHS}|{_SPACES}",),
        whole_words=True,
        adds_bos=True,
    ),
    PreTokenizer(
        names=("gpt-4o", "llama4", "kanana2"),
        splits=(
            rf"{_CASED_WORDS[0]}{_CONTRACTIONS}?|{_CASED_WORDS[1]}{_CONTRACTIONS}?|"
            rf"\p{{N}}{{1,3}}|{_PATHS}|{_SPACES}",
        ),
    ),
    PreTokenizer(
        names=("deepseek-llm",),
        splits=(
            "[\r\n]",
            rf"\s?[{_CASED_ALPHABETS}]+",
            r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
            r"\s+$",
            _IDEOGRAPHS_AND_HANGUL,
            r"\p{N}+",
        ),
    ),
    PreTokenizer(
        names=("deepseek-coder",),
        splits=("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _IDEOGRAPHS_AND_HANGUL, r"\p{N}"),
    ),
    PreTokenizer(
        names=("deepseek-v3", "hunyuan-dense"), splits=(r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK_WORDS)
    ),
    PreTokenizer(
        names=("seed-coder",),
        splits=(rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",),
    ),
    PreTokenizer(names=("viking",), splits=(r" ?[^(\s|.,!?…。，、।۔،)]+", r"\p{N}")),
    PreTokenizer(names=("falcon",), splits=(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
)

PRE_TOKENIZERS = {name: entry for entry in _PRE_TOKENIZERS for name in entry.names}
"""By name."""


def find_pre_tokenizer(name: str | None) -> PreTokenizer:
    """The pre-tokenizer that a file names.

    Raises:
        TokenizerError: There is no name, or it isn't known. A guess would give other tokens than the model was trained
            on, and worse text, without a word.
    """
    if name is None:
        raise TokenizerError(
            "the GGUF file doesn't say how its tokenizer splits text (tokenizer.ggml.pre), as files of old converters "
            "don't; take a newer file, or the model's Hugging Face folder"
        )
    if name not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"tokenizer.ggml.pre is {name[:100]!r}, and it isn't known how that splits text; "
            f"known are {', '.join(PRE_TOKENIZERS)}; use the model's Hugging Face folder instead"
        )
    return PRE_TOKENIZERS[name]


def name_pre_tokenizer(splits: Sequence[str | None], *, whole_words: bool, composes: bool) -> str:
    """The name for a way to cut text; the inverse of `find_pre_tokenizer`.

    Args:
        splits: Regular expressions, one after the other; None: GPT-2's.
        whole_words: As in `PreTokenizer`.
        composes: As there.

    Raises:
        TokenizerError: No name stands for it.
    """
    wanted = tuple(_GPT2 if split is None else split for split in splits)
    for entry in _PRE_TOKENIZERS:
        if (entry.splits, entry.whole_words, entry.composes) == (wanted, whole_words, composes):
            return entry.names[0]
    raise TokenizerError(
        f"the tokenizer splits text by {' and then '.join(wanted) or 'nothing'}"
        f"{', takes whole words' if whole_words else ''}{', composes characters' if composes else ''}; llama.cpp has "
        f"no name for that among {', '.join(entry.names[0] for entry in _PRE_TOKENIZERS)}"
    )
