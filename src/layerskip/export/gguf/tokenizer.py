"""Tokenizer keys of a GGUF file from a checkpoint's tokenizer; the inverse of `layerskip.checkpoint.gguf.tokenizer`.

The keys are checked by reading them again: the tokenizer that they describe must give the same tokens as the original.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from layerskip.checkpoint.checkpoint import Checkpoint
from layerskip.checkpoint.folder import TOKENIZER_FILES
from layerskip.checkpoint.gguf.file import GGUFFile
from layerskip.checkpoint.gguf.pretokenizers import name_pre_tokenizer
from layerskip.checkpoint.gguf.tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, build_text_tokenizer
from layerskip.checkpoint.gguf.vocabulary import BYTE_LEVEL, PREFIX, SENTENCE_PIECE, TokenType
from layerskip.errors import TokenizerError
from layerskip.export.gguf.config import ARCHITECTURE_OF
from layerskip.model.config.model_config import ModelConfig
from layerskip.text.tokenizer import TextTokenizer, Tokenizer

NO_TOKENIZER = "no_vocab"
"""Kind of tokenizer of a file without one: llama.cpp takes token ids then, and no text."""
ARCHITECTURE = "general.architecture"
"""Key on which a tokenizer's rules for spaces depend."""
END_OF_MESSAGE = "<|eom_id|>"
PROBES = (
    "Hello world",
    "two  and three   spaces\tand tabs\n\n  new lines \r\n",
    "I've it's THEY'LL don't",
    "1234567 3.14159 0x1F 12:34",
    "def add(a, b):\n    return a + b  # (c) [d] {e}\n",
    "Straße, où, naïve, ¿qué?, Привет, שלום, नमस्ते, 日本語 한국어",
    "🙂 👨‍👩‍👧 →≠∞ ½ ",
    "CamelCase snake_case kebab-case path/to/file.py https://example.org/?q=1&r=2",
)
"""Texts whose tokens must be the same."""
LEADING_SPACES = (" a", "  two words")
"""Texts before which llama.cpp puts one more space where a tokenizer adds spaces, and transformers doesn't."""


def tokenizer_keys(checkpoint: Checkpoint, config: ModelConfig) -> tuple[dict[str, Any], list[str]]:
    """The keys that describe a checkpoint's tokenizer, and notes.

    A GGUF file's own keys are taken as they are.

    Args:
        checkpoint: The model.
        config: Its sizes.

    Returns:
        Texts, whole numbers, booleans, and lists of texts, whole numbers or numbers, by key.

    Raises:
        TokenizerError: GGUF files can't describe the tokenizer, or it is damaged.
    """
    if isinstance(checkpoint.files, GGUFFile):
        metadata = checkpoint.files.container.plain_metadata()
        keys = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
        return (keys, []) if f"{PREFIX}tokens" in keys else _without_tokenizer(config)
    folder = checkpoint.hugging_face_folder
    if folder is None or not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return _without_tokenizer(config)
    tokenizer = checkpoint.text_tokenizer
    content = _content(tokenizer)
    kind = _kind(content)
    keys = {
        f"{PREFIX}model": kind,
        **_vocabulary(content, config.vocab_size, kind),
        **(_byte_level(content) if kind == BYTE_LEVEL else _sentence_piece(content, config.vocab_size)),
        **_special_tokens(tokenizer, checkpoint.eos_token_ids, config.vocab_size),
        **_chat_template(tokenizer),
    }
    return keys, _differences({**keys, ARCHITECTURE: ARCHITECTURE_OF[config.model_type]}, tokenizer)


def _without_tokenizer(config: ModelConfig) -> tuple[dict[str, Any], list[str]]:
    ids = {"bos": config.bos_token_id, "eos": next(iter(config.eos_token_ids), None)}
    keys = {f"{PREFIX}{name}_token_id": token_id for name, token_id in ids.items() if token_id is not None}
    note = "the model has no tokenizer, and so the file has none: it takes token ids, and no text"
    return {f"{PREFIX}model": NO_TOKENIZER, **keys}, [note]


def _content(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer as a tokenizer.json."""
    backend = (
        tokenizer.backend if isinstance(tokenizer, TextTokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    )
    if backend is None:
        raise TokenizerError(
            f"the tokenizer is a {type(tokenizer).__name__}, written in Python; only those with a tokenizer.json can "
            "be written into a GGUF file"
        )
    content: dict[str, Any] = json.loads(backend.to_str())
    return content


def _kind(content: Mapping[str, Any]) -> str:
    """GGUF's kind of tokenizer."""
    model = content["model"]
    if model["type"] != "BPE":
        raise TokenizerError(
            f"the tokenizer is of type {model['type']}; only byte-level BPE and SentencePiece's BPE can be written "
            "into a GGUF file"
        )
    return SENTENCE_PIECE if model.get("byte_fallback") else BYTE_LEVEL


def _byte_level(content: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a byte-level BPE: its merges, and the name of the way in which it cuts text."""
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    normalizers = _steps(content["normalizer"], "normalizers")
    if any(step["type"] != "NFC" for step in normalizers):
        raise TokenizerError(
            f"the tokenizer normalises text by {normalizers[0]['type']}, which GGUF files can't say; it can't be "
            "written"
        )
    name = name_pre_tokenizer(
        _splits(_steps(content["pre_tokenizer"], "pretokenizers")),
        whole_words=bool(content["model"].get("ignore_merges")),
        composes=bool(normalizers),
    )
    return {f"{PREFIX}pre": name, f"{PREFIX}merges": merges}


def _splits(steps: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """Regular expressions of the steps that cut a text; None: GPT-2's, which is built in."""
    splits: list[str | None] = []
    for step in steps:
        match step:
            case {"type": "Split", "behavior": "Isolated", "pattern": {"Regex": expression}, "invert": False}:
                splits.append(expression)
            case {"type": "Digits", "individual_digits": True}:
                splits.append(r"\p{N}")
            case {"type": "ByteLevel", "add_prefix_space": False}:
                splits += [None] if step.get("use_regex", True) else []
            case _:
                raise TokenizerError(
                    f"the tokenizer cuts text by a step {json.dumps(step)[:200]}, which GGUF files can't say; it "
                    "can't be written"
                )
    return splits


def _sentence_piece(content: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Keys of a SentencePiece BPE: a score for each token, from the order of merges."""
    model = content["model"]
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    vocab = {**model["vocab"], **{token["content"]: token["id"] for token in content["added_tokens"]}}
    scores = [-float(len(ranks) + token_id) for token_id in range(vocab_size)]
    for token, token_id in vocab.items():
        if token in ranks and token_id < vocab_size:
            scores[token_id] = -float(ranks[token])
    steps = _steps(content["normalizer"], "normalizers") + _steps(content["pre_tokenizer"], "pretokenizers")
    prefixes = [
        step for step in steps if step["type"] == "Prepend" or step.get("prepend_scheme") in ("first", "always")
    ]
    known = {"Prepend", "Replace", "Metaspace", "Split"}
    others = [step["type"] for step in steps if step["type"] not in known]
    if others:
        raise TokenizerError(f"the tokenizer has a step {others[0]!r}, which GGUF files can't say; it can't be written")
    return {f"{PREFIX}scores": scores, f"{PREFIX}add_space_prefix": bool(prefixes)}


def _vocabulary(content: Mapping[str, Any], vocab_size: int, kind: str) -> dict[str, Any]:
    """Tokens and their types, with a name for each row of the embedding that has no token."""
    added = {token["id"]: token for token in content["added_tokens"]}
    by_id = {token_id: token for token, token_id in content["model"]["vocab"].items()}
    last = max(by_id.keys() - added.keys(), default=0)  # added tokens may have no row, as an image's in Gemma 3
    if last >= vocab_size:
        raise TokenizerError(
            f"the tokenizer has the id {last}, and the model's embedding {vocab_size} rows; they don't belong together"
        )
    by_id |= {token_id: token["content"] for token_id, token in added.items()}
    unknown = content["model"].get("unk_token") if kind == SENTENCE_PIECE else None
    tokens, types = [], []
    for token_id in range(vocab_size):
        token = by_id.get(token_id, f"[PAD{token_id}]")
        tokens.append(token)
        if token_id not in by_id:
            types.append(TokenType.UNUSED)
        elif token == unknown:
            types.append(TokenType.UNKNOWN)
        elif token_id in added:
            types.append(TokenType.CONTROL if added[token_id]["special"] else TokenType.USER_DEFINED)
        elif kind == SENTENCE_PIECE and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types.append(TokenType.BYTE)
        else:
            types.append(TokenType.NORMAL)
    return {f"{PREFIX}tokens": tokens, f"{PREFIX}token_type": [int(kind) for kind in types]}


def _special_tokens(tokenizer: Tokenizer, ends: Sequence[int], vocab_size: int) -> dict[str, Any]:
    """Ids of special tokens, and which are put around a text.

    Args:
        tokenizer: The original.
        ends: Ids that end a text by generation_config.json or config.json. A file names three at most: `eos`, the
            tokenizer's own, `eot` and `eom`.
        vocab_size: V; tokens beyond are left out.
    """
    keys: dict[str, Any] = {}
    ids = {}
    for name, gguf_name in SPECIAL_TOKENS.items():
        token = tokenizer.special_tokens_map.get(name)
        token_id = None if token is None else tokenizer.convert_tokens_to_ids([token])[0]
        if token_id is not None and token_id < vocab_size:
            ids[name] = keys[f"{PREFIX}{gguf_name}_token_id"] = token_id
    others = [token_id for token_id in ends if token_id != ids.get("eos_token")]
    if "eos_token" not in ids and others:
        keys[f"{PREFIX}eos_token_id"] = others.pop(0)
    names = tokenizer.convert_ids_to_tokens(others)
    for token_id, name in zip(others, names, strict=True):
        keys.setdefault(f"{PREFIX}{'eom' if name == END_OF_MESSAGE else 'eot'}_token_id", token_id)
    text = tokenizer.encode("a")
    keys[f"{PREFIX}add_bos_token"] = text[:1] == [ids.get("bos_token")]
    keys[f"{PREFIX}add_eos_token"] = len(text) > 1 and text[-1:] == [ids.get("eos_token")]
    return keys


def _chat_template(tokenizer: Tokenizer) -> dict[str, str]:
    templates = tokenizer.chat_template
    if templates is None:
        return {}
    if isinstance(templates, str):
        return {CHAT_TEMPLATE: templates}
    named = {f"{CHAT_TEMPLATE}.{name}": text for name, text in templates.items() if name != "default"}
    return named | ({CHAT_TEMPLATE: templates["default"]} if "default" in templates else {})


def _differences(keys: Mapping[str, Any], original: Tokenizer) -> list[str]:
    """Compare the tokenizer that the keys describe with the original.

    Returns:
        Notes if they differ at spaces that begin a text or are beside special tokens, where llama.cpp has rules of its
        own.

    Raises:
        TokenizerError: They differ elsewhere.
    """
    written = build_text_tokenizer(keys)
    for text in PROBES:
        ours, theirs = written.encode(text), original.encode(text)
        if ours != theirs:
            raise TokenizerError(
                f"the tokenizer can't be written into a GGUF file: llama.cpp would read {text!r} as the tokens "
                f"{ours[:12]}, and the model's own tokenizer reads {theirs[:12]}"
            )
    notes = []
    if any(written.encode(text) != original.encode(text) for text in LEADING_SPACES):
        notes.append("llama.cpp reads a text that begins with a space otherwise than the model's own tokenizer")
    known = len(keys[f"{PREFIX}tokens"])
    special = [token.content for token_id, token in original.added_tokens_decoder.items() if token_id < known][:8]
    around = [f"a {token} b" for token in special] + [f"{token}\na" for token in special]
    differing = [text for text in around if written.encode(text) != original.encode(text)]
    if differing:
        notes.append(f"llama.cpp reads spaces around special tokens otherwise, as in {differing[0]!r}")
    return notes


def _steps(part: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """Steps of a part of the tokenizer that may be one step, several, or none."""
    if part is None:
        return []
    return [step for each in part[name] for step in _steps(each, name)] if part["type"] == "Sequence" else [part]
