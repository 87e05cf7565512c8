"""The tokenizer of a folder in Hugging Face's format, read without transformers where that gives the same tokens.

tokenizer.json says how text becomes tokens, but transformers doesn't always take it as it stands: its classes for some
families take the vocabulary and the merges from it, and build the rest themselves.
`TokenizerFolder.why_transformers` finds out whether what they would build is what the file has.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip.errors import brief
from layerskip.files import parse_json
from layerskip.text.tokenizer import ChatTemplates, TextTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
MISTRAL_FILE = "tekken.json"
"""A tokenizer in Mistral's own format, which transformers prefers where it can read it."""
TEMPLATE_FILE, TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"
AS_IT_STANDS = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""What `tokenizer_class` is where tokenizer.json counts as it stands: both names of transformers' general class."""
FAMILY_CLASSES = {
    "llama": None,
    "mistral": AS_IT_STANDS[0],
    "phi3": AS_IT_STANDS[0],
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "gemma3_text": "GemmaTokenizer",
    "olmo2": AS_IT_STANDS[0],
    "granite": AS_IT_STANDS[0],
    "smollm3": None,
    "mixtral": AS_IT_STANDS[0],
    "qwen3_moe": "Qwen2Tokenizer",
}
"""Class that transformers has for a `model_type`. Unless it is the general one, the class that tokenizer_config.json
names counts all the same."""
OVERRULING = ("qwen2",)
"""Families whose class counts whatever tokenizer_config.json names."""
LEGACY_FILES = ("special_tokens_map.json", "added_tokens.json")
"""Read by transformers where tokenizer_config.json has no `added_tokens_decoder`."""
ACTING_KEYS = frozenset(
    "fast_tokenizer_files fix_mistral_regex gguf_file init_inputs merges "
    "post_processor split_special_tokens tokenizer_object tokenizer_padding tokenizer_truncation vocab".split()
)
"""Keys of tokenizer_config.json that change how text is read, unless they are false or empty."""
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that every tokenizer may have."""
QWEN_SPLIT = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+|\s+(?!\S)|\s+",
    ]
)


@dataclass(frozen=True, kw_only=True)
class BuiltClass:
    """What a class of transformers makes of a vocabulary with merges, whatever else tokenizer.json says."""

    special_tokens: Mapping[str, str]
    """Those that it has where tokenizer_config.json doesn't name any."""
    normalizer: Mapping[str, Any]
    pre_tokenizer: Mapping[str, Any]
    decoder: Mapping[str, Any]
    fuses_unknown: bool
    falls_back_on_bytes: bool
    knows_unknown: bool
    """Whether its model has the `unk_token`."""


BUILT_CLASSES = {
    "GemmaTokenizer": BuiltClass(
        special_tokens={
            "unk_token": "<unk>",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "mask_token": "<mask>",
        },
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        pre_tokenizer={
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        fuses_unknown=True,
        falls_back_on_bytes=True,
        knows_unknown=True,
    ),
    "Qwen2Tokenizer": BuiltClass(
        special_tokens=dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
        normalizer={"type": "NFC"},
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": QWEN_SPLIT}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        },
        decoder={"type": "ByteLevel"},
        fuses_unknown=False,
        falls_back_on_bytes=False,
        knows_unknown=False,
    ),
}
"""Classes whose results can be told from the files."""


@dataclass(frozen=True)
class TokenizerFolder:
    """A folder's files of the tokenizer, each read when it is first needed."""

    folder: Path

    def why_transformers(self) -> str | None:
        """What only transformers can read; None where `read` gives a tokenizer with the same results."""
        try:
            return next(self._obstacles(), None)
        except Exception as error:  # a damaged file, of which `tokenizers` raises bare Exceptions
            return f"the files can't be read ({brief(error)})"

    def read(self) -> TextTokenizer:
        """The tokenizer, where `why_transformers` finds nothing."""
        return TextTokenizer(
            self._backend,
            special_tokens=self._special_tokens,
            extra_special_tokens=self._extra_tokens,
            chat_template=self._chat_template,
            name_or_path=str(self.folder),
        )

    @property
    def as_it_stands(self) -> bool:
        """Whether the files ask for tokenizer.json as it is."""
        return self._config.get("tokenizer_class") in AS_IT_STANDS and (self.folder / TOKENIZER_FILE).is_file()

    def _obstacles(self) -> Iterator[str]:
        if not (self.folder / TOKENIZER_FILE).is_file():
            yield f"there is no {TOKENIZER_FILE}"
        acting = [key for key in sorted(ACTING_KEYS & set(self._config)) if self._config[key]]
        if acting:
            yield f"{CONFIG_FILE} has {acting[0]!r}"
        if "added_tokens_decoder" not in self._config:
            yield from (f"there is {name}" for name in LEGACY_FILES if (self.folder / name).exists())
        if not self.as_it_stands and "auto_map" in self._config:
            yield f"{CONFIG_FILE} names code of its own"
        if not self.as_it_stands and (self.folder / MISTRAL_FILE).exists():
            yield f"there is {MISTRAL_FILE}"
        if self._class not in (*AS_IT_STANDS, *BUILT_CLASSES):
            yield f"its class is {self._class}"
        if self._backend.padding is not None:
            yield f"{TOKENIZER_FILE} pads"
        yield from self._other_added_tokens()
        if self._class in BUILT_CLASSES:
            yield from self._other_parts(BUILT_CLASSES[self._class])
        _ = self._special_tokens, self._extra_tokens, self._chat_template  # what they raise is an obstacle as well

    def _other_added_tokens(self) -> Iterator[str]:
        """Added tokens that transformers would have otherwise than tokenizer.json gives them."""
        from tokenizers import AddedToken

        if "added_tokens_decoder" in self._config:
            tokens = self._config["added_tokens_decoder"]
            listed = {int(token_id): repr(AddedToken(**token)) for token_id, token in tokens.items()}
        elif self._class in BUILT_CLASSES:
            tokens = parse_json((self.folder / TOKENIZER_FILE).read_bytes())["added_tokens"]
            listed = {token.pop("id"): repr(AddedToken(**token)) for token in tokens}
        else:
            return
        ours = {token_id: repr(token) for token_id, token in self._backend.get_added_tokens_decoder().items()}
        complete = self._class not in BUILT_CLASSES or set(ours) == set(listed)
        if not complete or any(ours.get(token_id) != token for token_id, token in listed.items()):
            yield f"{CONFIG_FILE} has other added tokens than {TOKENIZER_FILE}"

    def _other_parts(self, built: BuiltClass) -> Iterator[str]:
        """Parts of tokenizer.json that the class builds otherwise."""
        model: Any = self._backend.model
        parts: dict[str, tuple[Any, Any]] = {
            "normalizer": (_content(self._backend.normalizer), built.normalizer),
            "pre_tokenizer": (_content(self._backend.pre_tokenizer), built.pre_tokenizer),
            "decoder": (_content(self._backend.decoder, decodes=True), built.decoder),
            "model": (type(model).__name__, "BPE"),
            "dropout": (model.dropout, None),
            "fuse_unk": (model.fuse_unk, built.fuses_unknown),
            "byte_fallback": (model.byte_fallback, built.falls_back_on_bytes),
            "ignore_merges": (model.ignore_merges, False),
            "unk_token": (model.unk_token, self._special_tokens.get("unk_token") if built.knows_unknown else None),
            "prefix": (model.continuing_subword_prefix or None, None),
            "suffix": (model.end_of_word_suffix or None, None),
            "add_prefix_space": (bool(self._config.get("add_prefix_space")), False),
        }
        yield from (f"{self._class} has another {name}" for name, (ours, theirs) in parts.items() if ours != theirs)
        added = {token.content: repr(token) for token in self._backend.get_added_tokens_decoder().values()}
        for token in (*self._special_tokens.values(), *self._extra_tokens):
            if added.get(token, _special(token)) != _special(token):
                yield f"{self._class} has another token {token!r}"

    @cached_property
    def _config(self) -> dict[str, Any]:
        path = self.folder / CONFIG_FILE
        config = parse_json(path.read_bytes()) if path.is_file() else {}
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG_FILE} holds no object")
        return config

    @cached_property
    def _backend(self) -> "Tokenizer":
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.folder / TOKENIZER_FILE))

    @cached_property
    def _class(self) -> str:
        """The class that transformers would take."""
        named = self._config.get("tokenizer_class")
        if self.as_it_stands:
            return AS_IT_STANDS[0]
        path = self.folder / "config.json"
        family = parse_json(path.read_bytes())["model_type"] if path.is_file() else None
        if not isinstance(named, str) or family not in FAMILY_CLASSES:
            return f"{named!r} for a model of type {family!r}"
        own = FAMILY_CLASSES[family]
        if own in AS_IT_STANDS or (own is not None and family in OVERRULING):
            return own
        return named.removesuffix("Fast")

    @cached_property
    def _special_tokens(self) -> dict[str, str]:
        """Special tokens by name: those that every tokenizer may have, then the family's own."""
        built = BUILT_CLASSES.get(self._class)
        given = {**({} if built is None else built.special_tokens), **self._config}
        general = {name: given[name] for name in NAMES if given.get(name) is not None}
        own = {name: token for name, token in given.items() if name.endswith("_token") and isinstance(token, str)}
        own = {name: token for name, token in own.items() if name not in NAMES}
        extra = self._config.get("extra_special_tokens")
        own |= extra if isinstance(extra, dict) else {}
        own = own or self._config.get("model_specific_special_tokens") or {}
        return {name: _text(token) for name, token in {**general, **own}.items()}

    @cached_property
    def _extra_tokens(self) -> list[str]:
        """Special tokens that have no name."""
        extra = self._config.get("extra_special_tokens") or self._config.get("additional_special_tokens") or []
        return [] if isinstance(extra, dict) else [_text(token) for token in extra]

    @cached_property
    def _chat_template(self) -> ChatTemplates | None:
        """The template, or all by name: files count before tokenizer_config.json."""
        files = {path.stem: path for path in sorted((self.folder / TEMPLATE_FOLDER).glob("*.jinja"))}
        if (self.folder / TEMPLATE_FILE).is_file():
            files = {"default": self.folder / TEMPLATE_FILE, **files}
        if files:
            read = {name: path.read_text("utf-8") for name, path in files.items()}
            return read["default"] if list(read) == ["default"] else read
        given = self._config.get("chat_template")
        if isinstance(given, Sequence) and not isinstance(given, str):
            given = {entry["name"]: entry["template"] for entry in given}
        texts = list(given.values()) if isinstance(given, dict) else [given]
        if given is not None and not all(isinstance(text, str) for text in texts):
            raise TypeError(f"{CONFIG_FILE} has a chat_template that is no text")
        return given


def _text(token: Any) -> str:
    """A special token that is given as text, and not with settings of its own."""
    if not isinstance(token, str):
        raise TypeError(f"{CONFIG_FILE} has a special token that is no text")
    return token


def _special(token: str) -> str:
    """A special token without further settings, as `repr` writes it."""
    from tokenizers import AddedToken

    return repr(AddedToken(token, special=True))


def _content(part: Any, *, decodes: bool = False) -> Any:
    """A part of a tokenizer as JSON, without what doesn't change tokens or texts."""
    if part is None:
        return None
    idle = ("trim_offsets", "add_prefix_space", "use_regex") if decodes else ("trim_offsets",)

    def without(entry: dict[str, Any]) -> dict[str, Any]:
        is_byte_level = entry.get("type") == "ByteLevel"
        return {key: value for key, value in entry.items() if not (is_byte_level and key in idle)}

    return json.loads(part.__getstate__(), object_hook=without)
