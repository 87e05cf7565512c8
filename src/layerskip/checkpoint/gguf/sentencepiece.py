"""SentencePiece's BPE, which merges by the score of what a merge makes, as a list of merges in order."""

from typing import TYPE_CHECKING

from layerskip.checkpoint.gguf.vocabulary import PREFIX, TokenType, Vocabulary, shown
from layerskip.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "▁"
"""How the vocabulary writes a space."""
MAX_PIECE_LENGTH = 512
"""Characters of the longest piece that merges may make; SentencePiece's own limit is 16 unless set otherwise."""
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def build_sentence_piece(vocabulary: Vocabulary, *, unknown: str | None, space_prefix: bool) -> "Tokenizer":
    """The tokenizer without its added tokens.

    Args:
        vocabulary: Tokens with scores.
        unknown: Token for characters that have neither a token nor bytes.
        space_prefix: Whether a space is put before a text, and before what follows an added token.

    Raises:
        TokenizerError: There are no scores, or not all bytes and no unknown token.
    """
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    missing_bytes = sorted(_BYTES - set(vocabulary.tokens))
    if missing_bytes and unknown is None:
        raise TokenizerError(
            f"the GGUF file's vocabulary has no token {missing_bytes[0]} for a byte and no unknown token, "
            "so there is text that it can't write; it is damaged"
        )
    tokenizer = Tokenizer(
        BPE(
            vocab={token: token_id for token_id, token in enumerate(vocabulary.tokens)},
            merges=merges_by_score(vocabulary),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=not missing_bytes,
        )
    )
    escape = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), escape]) if space_prefix else escape
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def merges_by_score(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, pairs that make a token of a higher score first.

    SentencePiece replaces, of all neighbours in a text, those that make the token of the highest score, and the
    leftmost among equals. A list of merges says the same where all scores differ, as they do in every vocabulary that
    SentencePiece trained. Of two tokens with the same score, the one of the lower id comes first: trainers number
    tokens in the order in which they merge. Bytes and control tokens are never made by merges, since text must not
    turn into them.

    Raises:
        TokenizerError: There are no scores, or a piece is too long.
    """
    if vocabulary.scores is None:
        raise TokenizerError(
            f"the GGUF file has no {PREFIX}scores, which its tokenizer needs; it is damaged or incomplete"
        )
    tokens, scores = vocabulary.tokens, vocabulary.scores
    never_made = {TokenType.BYTE, TokenType.CONTROL, TokenType.UNKNOWN}
    made = [token_id for token_id, kind in enumerate(vocabulary.types) if kind not in never_made]
    made.sort(key=lambda token_id: -scores[token_id])
    known = set(tokens)
    merges = []
    for token_id in made:
        token = tokens[token_id]
        if len(token) > MAX_PIECE_LENGTH:
            if vocabulary.types[token_id] == TokenType.USER_DEFINED:
                continue  # found in the text as it is
            raise TokenizerError(
                f"the GGUF file's token {token_id}, {shown(token)}, has {len(token)} characters; "
                f"at most {MAX_PIECE_LENGTH} are supported"
            )
        for cut in range(1, len(token)):
            left = token[:cut]
            if left in known and (right := token[cut:]) in known:
                merges.append((left, right))
    return merges
