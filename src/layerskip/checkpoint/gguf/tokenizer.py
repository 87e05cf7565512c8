"""The tokenizer of a GGUF file, built from its key-value section.

Token ids are those of the tokenizer that the model was trained with, as llama.cpp's are (`pretokenizers.py` says where
the two part). Special tokens are found in text, as in transformers and in llama.cpp with `parse_special`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layerskip.checkpoint.gguf.pretokenizers import PreTokenizer, find_pre_tokenizer
from layerskip.checkpoint.gguf.sentencepiece import build_sentence_piece
from layerskip.checkpoint.gguf.vocabulary import (
    PREFIX,
    SENTENCE_PIECE,
    TokenizerKeys,
    TokenType,
    Vocabulary,
    read_vocabulary,
    shown,
)
from layerskip.errors import TokenizerError
from layerskip.text.tokenizer import ChatTemplates, TextTokenizer

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",  # sic, in the format
    "pad_token": "padding",
    "mask_token": "mask",
}
"""GGUF's names of special tokens by transformers'."""
SENTENCE_PIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}
"""What SentencePiece's trainer numbers so by default, and a file may leave out."""
ENDS = frozenset(
    "<|eot_id|> <|eom_id|> <|im_end|> <|end|> <end_of_turn> <|endoftext|> <|end_of_text|> <EOT> "
    "<｜end▁of▁sentence｜>".split()
)
"""Control tokens that end a text or a turn in the families there are; files older than the keys name only one."""
CHAT_TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """What a file's tokenizer consists of."""

    backend: "Tokenizer"
    special_tokens: dict[str, str]
    """By transformers' names."""
    adds_bos: bool
    adds_eos: bool
    chat_template: ChatTemplates | None


def build_text_tokenizer(metadata: Mapping[str, Any]) -> TextTokenizer:
    """Build the tokenizer that a file describes.

    Args:
        metadata: The file's key-value section; a damaged file may hold anything under a key.

    Raises:
        TokenizerError: The file has no tokenizer, a damaged one, or one of a kind that isn't supported.
    """
    from tokenizers.processors import TemplateProcessing

    parts = _read(metadata)
    bos, eos = parts.special_tokens.get("bos_token"), parts.special_tokens.get("eos_token")
    around = [token for token in (parts.adds_bos and bos, "$A", parts.adds_eos and eos) if token]
    added = [(token, parts.backend.token_to_id(token)) for token in around if token != "$A"]
    parts.backend.post_processor = TemplateProcessing(single=" ".join(around), special_tokens=added)
    return TextTokenizer(parts.backend, special_tokens=parts.special_tokens, chat_template=parts.chat_template)


def build_tokenizer(metadata: Mapping[str, Any]) -> "PreTrainedTokenizerFast":
    """Build the same tokenizer as one of transformers.

    Args:
        metadata: As for `build_text_tokenizer`.

    Raises:
        TokenizerError: As there.
    """
    from transformers import PreTrainedTokenizerFast

    parts = _read(metadata)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=parts.backend,
        chat_template=parts.chat_template,
        add_bos_token=parts.adds_bos,
        add_eos_token=parts.adds_eos,
        clean_up_tokenization_spaces=False,
        **parts.special_tokens,
    )


def _read(metadata: Mapping[str, Any]) -> _Parts:
    checked = TokenizerKeys(metadata)
    vocabulary = read_vocabulary(checked)
    names = _special_tokens(checked, vocabulary)
    if vocabulary.model == SENTENCE_PIECE:
        adds_bos, backend = True, _sentence_piece(checked, vocabulary, names.get("unk_token"))
    else:
        pre_tokenizer = find_pre_tokenizer(checked.text(f"{PREFIX}pre"))
        adds_bos, backend = pre_tokenizer.adds_bos, _byte_level(checked, vocabulary, pre_tokenizer)
    _add_tokens(checked, vocabulary, backend)
    return _Parts(
        backend=backend,
        special_tokens=names,
        adds_bos=_is_added(checked, "bos", names, default=adds_bos),
        adds_eos=_is_added(checked, "eos", names, default=False),
        chat_template=_chat_template(checked),
    )


def end_of_text_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids after which there is nothing more to generate: ends of texts, of turns and of messages; `eos` first.

    Raises:
        TokenizerError: The file has no vocabulary, or an id isn't in it.
    """
    checked = TokenizerKeys(metadata)
    vocabulary = read_vocabulary(checked)
    named = [_token_id(checked, vocabulary, name) for name in ("eos", "eot", "eom")]
    by_text = [token_id for token_id in vocabulary.ids(TokenType.CONTROL) if vocabulary.tokens[token_id] in ENDS]
    return tuple(dict.fromkeys([token_id for token_id in named if token_id is not None] + by_text))


def _byte_level(metadata: TokenizerKeys, vocabulary: Vocabulary, pre_tokenizer: PreTokenizer) -> "Tokenizer":
    """The byte-level BPE tokenizer without its added tokens."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    vocab = {token: token_id for token_id, token in enumerate(vocabulary.tokens)}
    merges = _merges(metadata.texts(f"{PREFIX}merges"), vocab)
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=pre_tokenizer.whole_words))
    if pre_tokenizer.composes:
        tokenizer.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in pre_tokenizer.splits]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merges(texts: list[str], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The merges in their order, each of two tokens that make a third."""
    merges: dict[tuple[str, str], None] = {}
    for index, text in enumerate(texts):
        left, _, right = text.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise TokenizerError(
                f"the GGUF file's {PREFIX}merges holds {shown(text)} at {index}, but that must be two tokens "
                "of the vocabulary with a space between them that make a third; it is damaged"
            )
        merges.setdefault((left, right))
    return list(merges)


def _sentence_piece(metadata: TokenizerKeys, vocabulary: Vocabulary, unknown: str | None) -> "Tokenizer":
    """The SentencePiece tokenizer without its added tokens."""
    if metadata.flag(f"{PREFIX}remove_extra_whitespaces"):
        raise TokenizerError(
            f"the GGUF file's {PREFIX}remove_extra_whitespaces is true, which isn't supported for {SENTENCE_PIECE} "
            "tokenizers; use the model's Hugging Face folder instead"
        )
    space_prefix = metadata.flag(f"{PREFIX}add_space_prefix")
    return build_sentence_piece(vocabulary, unknown=unknown, space_prefix=space_prefix is not False)


def _token_id(metadata: TokenizerKeys, vocabulary: Vocabulary, name: str) -> int | None:
    """The id of a special token by GGUF's name for it."""
    token_id = metadata.token_id(name, len(vocabulary.tokens))
    if token_id is None and vocabulary.model == SENTENCE_PIECE:
        default = SENTENCE_PIECE_IDS.get(name, len(vocabulary.tokens))
        return default if default < len(vocabulary.tokens) else None
    return token_id


def _special_tokens(metadata: TokenizerKeys, vocabulary: Vocabulary) -> dict[str, str]:
    """Special tokens by transformers' names.

    Those besides `bos` and `eos` only where they aren't ordinary text: a file may name a word for padding, and
    transformers would leave that word out of all texts.
    """
    special = {}
    for name, gguf_name in SPECIAL_TOKENS.items():
        token_id = _token_id(metadata, vocabulary, gguf_name)
        if token_id is not None and (
            name in ("bos_token", "eos_token") or vocabulary.types[token_id] != TokenType.NORMAL
        ):
            special[name] = vocabulary.tokens[token_id]
    return special


def _is_added(metadata: TokenizerKeys, name: str, special_tokens: dict[str, str], *, default: bool) -> bool:
    """Whether texts get the `bos` or `eos` token."""
    is_added = metadata.flag(f"{PREFIX}add_{name}_token")
    if is_added is None:
        is_added = default
    token = special_tokens.get(f"{name}_token")
    if is_added and token is None:
        raise TokenizerError(
            f"the GGUF file's tokenizer adds its {name} token to texts, but {PREFIX}{name}_token_id is missing; "
            "the file is damaged or incomplete"
        )
    if is_added and token is not None and set(token) & set(" :$"):  # signs of the templates that tokens are added with
        raise TokenizerError(f"the GGUF file's {name} token is {shown(token)}, which can't be added to texts")
    return is_added


def _add_tokens(metadata: TokenizerKeys, vocabulary: Vocabulary, tokenizer: "Tokenizer") -> None:
    """Have control and user-defined tokens found in texts before anything else."""
    from tokenizers import AddedToken

    keeps_spaces = _tokens_that_keep_spaces(metadata, vocabulary)

    def added(token_id: int, *, special: bool) -> "AddedToken":
        token = vocabulary.tokens[token_id]
        rstrip = keeps_spaces is not None and token not in keeps_spaces
        return AddedToken(token, special=special, normalized=False, rstrip=rstrip)

    special_ids = vocabulary.ids(TokenType.CONTROL, TokenType.UNKNOWN)
    tokenizer.add_special_tokens([added(token_id, special=True) for token_id in special_ids])
    user_defined = vocabulary.ids(TokenType.USER_DEFINED)
    tokenizer.add_tokens([added(token_id, special=False) for token_id in user_defined])


def _tokens_that_keep_spaces(metadata: TokenizerKeys, vocabulary: Vocabulary) -> frozenset[str] | None:
    """Added tokens that leave the spaces after them in the text; `None` for all.

    The format has no place for it. Phi 3's other ones swallow them, newlines too, in its own tokenizer.
    """
    name = (metadata.text("general.name") or "").lower()
    is_phi3 = metadata.text("general.architecture") == "phi3" or "phi-3" in name or "phi3" in name
    return frozenset(("<unk>", "<s>", "<|endoftext|>")) if is_phi3 and vocabulary.model == SENTENCE_PIECE else None


def _chat_template(metadata: TokenizerKeys) -> ChatTemplates | None:
    """The chat template, or all by name where there are several."""
    default = metadata.text(CHAT_TEMPLATE)
    prefix = f"{CHAT_TEMPLATE}."
    keys = [key for key in metadata.values if isinstance(key, str) and key.startswith(prefix)]
    named = {key.removeprefix(prefix): text for key in keys if (text := metadata.text(key)) is not None}
    if not named:
        return default
    return named if default is None else {"default": default, **named}
