"""Small tokenizers of the kinds that real checkpoints have, made without files."""

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from layerskip.text.tokenizer import TextTokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
LETTERS = "▁abcdefghijklmnopqrstuvwxyzABCHT.,:!?\néü日"
WORDS = ["▁the", "▁hi", "▁a", "ing", "▁▁", "▁▁▁▁"]


def byte_fallback(kind: str) -> PreTrainedTokenizerFast:
    """BPE in which characters without a token are spelled with tokens such as <0xF0>.

    Args:
        kind: `llama2`, `mistral` or `gemma`: where spaces are put and taken away.
    """
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                pieces.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    match kind:
        case "llama2":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
            steps.append(decoders.Strip(" ", 1, 0))
        case "mistral":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
            steps.append(decoders.Strip(" ", 1, 0))
        case "gemma":
            tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(steps)
    return _finish(tokenizer)


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it: every token is some bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("ð", "Ł"), ("Ã", "©")]
    pieces = [*SPECIAL, *letters, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finish(tokenizer)


def word_piece() -> PreTrainedTokenizerFast:
    """Words and their ends; the decoder puts the spaces."""
    pieces = [*SPECIAL, "the", "hi", "a", "##ing", ",", ".", *"bcd", *(f"##{letter}" for letter in "abcdefgh")]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+|(?=[,.])"), "removed")
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return _finish(tokenizer)


def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece's other model, without byte fallback: unknown characters are <unk>."""
    pieces = [*SPECIAL, *LETTERS, *WORDS]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    return _finish(tokenizer)


def without_transformers(tokenizer: PreTrainedTokenizerFast) -> TextTokenizer:
    """The same tokenizer as this package has it."""
    return TextTokenizer(
        Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        special_tokens=tokenizer.special_tokens_map,
        extra_special_tokens=[str(token) for token in tokenizer.extra_special_tokens],
        chat_template=tokenizer.chat_template,
    )


def slow() -> PreTrainedTokenizerBase:
    """One without compiled code: bytes in Python."""
    return ByT5Tokenizer()


def _finish(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    special = [token for token in SPECIAL if token.startswith("<|")]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        additional_special_tokens=special,
    )
