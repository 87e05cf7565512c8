"""Checkpoints: a name, a folder or a hub id -> configuration, memory-mapped weights, tokenizer, network."""

from dataclasses import dataclass
from functools import cached_property
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from layerskip.checkpoint.contents import Contents
from layerskip.checkpoint.folder import HuggingFaceFolder
from layerskip.checkpoint.gguf.file import SUFFIX, GGUFFile, find_gguf
from layerskip.checkpoint.hub import download
from layerskip.checkpoint.known_file import Report
from layerskip.checkpoint.loading import LoadingConfig
from layerskip.checkpoint.names import MODELS, explain_absence, resolve
from layerskip.checkpoint.placement import choose_context, choose_device, choose_dtype, choose_kernels, choose_rounds
from layerskip.checkpoint.tuned import TunedSettings, read_tuned
from layerskip.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    InvalidArgumentError,
    OutOfMemoryError,
    TokenizerError,
)
from layerskip.files import cache_folder
from layerskip.model.cache import free_memory
from layerskip.model.config.families import parse_config
from layerskip.model.config.model_config import ModelConfig, read_eos
from layerskip.model.config.values import shown
from layerskip.model.decoder import Decoder
from layerskip.model.drafts import DraftWeights, frequent_tokens
from layerskip.model.rope import rope_bytes
from layerskip.model.weights.loading import (
    TensorSource,
    check_names,
    load_decoder,
    tensor_shapes,
    weight_bytes,
    with_own_head,
)
from layerskip.model.weights.quantization import check_quantization
from layerskip.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEMO_NAME = "demo"
DEMO_FOLDER = Path(__file__).parents[1] / "assets" / "demo"
WAYS_TO_NAME = f"{', '.join([repr(DEMO_NAME), *map(repr, MODELS)])}, a folder, a GGUF file, or a hub id ('owner/name')"
"""What a model can be called, for messages."""


class CheckpointFiles(Protocol):
    """What a checkpoint consists of, in whatever format; each part is read when it is first asked for."""

    @property
    def folder(self) -> Path:
        """Where it is."""
        ...

    @property
    def tuned_file(self) -> Path:
        """Where a sweep keeps the best setting (`tuned.py`)."""
        ...

    @property
    def contents(self) -> Contents:
        """Format, bytes and types of the weights on disk."""
        ...

    @property
    def raw_config(self) -> dict[str, Any]:
        """config.json in Hugging Face's terms."""
        ...

    @property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json in Hugging Face's terms; empty where the checkpoint says nothing."""
        ...

    @property
    def weights(self) -> TensorSource:
        """Tensors under Hugging Face's names."""
        ...

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer as transformers has it; raises `TokenizerError` if there is none."""
        ...

    @property
    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer, without transformers where that gives the same; raises `TokenizerError` if there is none."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A trained model on disk."""

    files: CheckpointFiles
    name: str
    """What the user called it."""

    @classmethod
    def in_folder(cls, folder: Path, name: str | None = None) -> "Checkpoint":
        """The checkpoint in a folder of Hugging Face's format, by default called as the folder is."""
        return cls(HuggingFaceFolder(folder), str(folder) if name is None else name)

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self.files.folder

    @property
    def raw_config(self) -> dict[str, Any]:
        """config.json in Hugging Face's terms."""
        return self.files.raw_config

    @property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json in Hugging Face's terms; empty where the checkpoint says nothing."""
        return self.files.generation_config

    @cached_property
    def config(self) -> ModelConfig:
        """The model's sizes and switches."""
        return parse_config(self.raw_config)

    @cached_property
    def network_config(self) -> ModelConfig:
        """The same of the network that the weights make: with a head of its own where the files have one."""
        return with_own_head(self.config, self.weights)

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a text: generation_config.json's; else config.json's; else the tokenizer's end token.

        The configurations win where they name any, as in transformers: a base model's `</s>` isn't joined by another
        token because the tokenizer calls that one its end (vLLM and llama.cpp join them). Texts that follow a
        conversation also end with the token that ends its turns: `LanguageModel.end_tokens`.
        """
        ends = read_eos(self.generation_config)
        for name, ids in (("generation_config.json", ends), ("config.json", self.config.eos_token_ids)):
            outside = [token for token in ids if not 0 <= token < self.config.vocab_size]
            if outside:
                raise CheckpointError(
                    f"{name} of {self.name} names the end token {shown(outside[0])}, and the vocabulary has the ids "
                    f"0 to {self.config.vocab_size - 1}; correct eos_token_id there"
                )
        return ends or self.config.eos_token_ids or self._tokenizer_eos()

    @cached_property
    def tuned(self) -> TunedSettings | None:
        """What a sweep found best for this checkpoint, if there was one."""
        return read_tuned(self.files.tuned_file, self.config.num_layers)

    @property
    def num_parameters(self) -> int:
        """Weights of the network; a tied head counts once."""
        return sum(torch.Size(shape).numel() for shape in tensor_shapes(self.network_config).values())

    @property
    def weights(self) -> TensorSource:
        """The checkpoint's tensors."""
        return self.files.weights

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer as transformers has it; raises `TokenizerError` if there is none, or it can't be read."""
        return self.files.tokenizer

    @property
    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer, without transformers where that gives the same; raises as `tokenizer` does."""
        return self.files.text_tokenizer

    @property
    def contents(self) -> Contents:
        """Format, bytes and types of the weights on disk."""
        return self.files.contents

    def load_decoder(self, loading: LoadingConfig | None = None) -> Decoder:
        """Load the network.

        Args:
            loading: How; as the defaults say if not given.

        Raises:
            InvalidArgumentError: Unknown dtype or device, a context beyond the model's, kernels that can't run it, or
                rounds that can't be compiled.
            OutOfMemoryError: The weights don't fit.
            CheckpointError: Anything wrong with the files.
        """
        how, config = loading or LoadingConfig(), self.network_config
        check_names(config, self.weights.names())
        device = choose_device(how.device)
        dtype = choose_dtype(how.dtype, device, self.raw_config)
        context = choose_context(config, how.max_context)
        rounds = choose_rounds(how.compile, how.kernels, device)
        native = choose_kernels(how.kernels, config, device, dtype) and rounds == "off"
        for name, value in (("quantize", how.quantize), ("quantize_draft", how.quantize_draft)):
            if value is not None:
                check_quantization(name, value, native=native, device=device, dtype=dtype)
        draft = self._draft_weights(how)
        weights = self.weights
        if how.quantize is None:
            needed = weight_bytes(config, weights, dtype, keeps_blocks=native)
        else:
            needed = self.num_parameters
        needed += sum(rope_bytes(rope, context, dtype) for rope in config.ropes.values())
        self._check_memory(needed, dtype, device)
        return load_decoder(
            config,
            weights,
            dtype=dtype,
            device=device,
            max_context=context,
            native=native,
            quantize=how.quantize,
            draft=draft,
            rounds=rounds,
        )

    def _tokenizer_eos(self) -> tuple[int, ...]:
        try:
            tokenizer = self.text_tokenizer
        except TokenizerError:
            return ()
        name = tokenizer.special_tokens_map.get("eos_token")
        ids = [] if name is None else tokenizer.convert_tokens_to_ids([name])
        return tuple(token_id for token_id in ids if token_id is not None and token_id < self.config.vocab_size)

    def _draft_weights(self, how: LoadingConfig) -> DraftWeights | None:
        tokens = None
        if how.draft_vocabulary is not None:
            tokens = self._frequent_tokens(how.draft_vocabulary, how.draft_text)
        elif how.draft_text is not None:
            raise InvalidArgumentError("draft_text ranks tokens for draft_vocabulary; give that as well")
        return DraftWeights(quantize=how.quantize_draft, tokens=tokens) if how.quantize_draft or tokens else None

    def _check_memory(self, needed: int, dtype: torch.dtype, device: torch.device) -> None:
        free = free_memory(device)
        if free is not None and needed > free:
            raise OutOfMemoryError(
                f"{self.name} needs {needed / 2**30:.2f} GiB in {dtype} and {free / 2**30:.2f} GiB are free on "
                f"{device}; use a 16-bit dtype, a smaller model or another device"
            )

    def _frequent_tokens(self, count: int, text: str | Path | None) -> tuple[int, ...]:
        """The tokens that drafts may be: end-of-sequence tokens, then the most frequent ones."""
        size = self.config.vocab_size
        if not 1 <= count <= size:
            raise InvalidArgumentError(f"draft_vocabulary must be from 1 to the vocabulary's {size}, got {count}")
        found: list[int] = []
        if text is not None:
            try:
                content = Path(text).read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise InvalidArgumentError(f"draft_text {str(text)!r} can't be read: {error}") from error
            found = self.text_tokenizer.encode(content, add_special_tokens=False)
        return frequent_tokens(found, count, size, self.eos_token_ids)


def open_checkpoint(name: str, *, revision: str | None = None, report: Report | None = None) -> Checkpoint:
    """Find a checkpoint by name, downloading it if it is a hub id.

    Args:
        name: `demo` (the embedded model), a model of `names.MODELS` (`smollm2`, `gemma3-270m`), a folder, a GGUF file,
            or a hub id (`owner/name`).
        revision: Branch, tag or commit of a hub repository; of a named model it asks for the hub's.
        report: Hears how far the files of a named model are put together and checked, in bytes.

    Raises:
        CheckpointNotFoundError: There is no such thing.
        GatedRepositoryError: Access has to be requested first.
        CheckpointError: The packages of a named model are damaged, or a download failed.
    """
    if isinstance(name, PathLike):
        name = fspath(name)
    if not isinstance(name, str):
        raise InvalidArgumentError(f"a model is named by a text, got {name!r}; give {WAYS_TO_NAME}")
    if not name:
        raise CheckpointNotFoundError(f"no model was named; give {WAYS_TO_NAME}")
    if name == DEMO_NAME:
        return Checkpoint.in_folder(DEMO_FOLDER, name)
    if name in MODELS:
        return _open_named(name, revision, report)
    try:
        path = Path(name).expanduser()
        if path.exists():
            return _open_path(path, name)
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, a character of no path
        raise CheckpointNotFoundError(
            f"{shown(name)} can't be a path ({error.__class__.__name__}); a model is {WAYS_TO_NAME}"
        ) from error
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointNotFoundError(f"there is no folder or file {shown(name)}; a model is {WAYS_TO_NAME}")
    return Checkpoint.in_folder(download(name, revision), name)


def _open_named(name: str, revision: str | None, report: Report | None) -> Checkpoint:
    """A model of `names.MODELS`, from its packages or from the hub."""
    if revision is not None:
        return Checkpoint.in_folder(download(MODELS[name].hub_id, revision), name)
    found = resolve(name, report)
    if isinstance(found, Path):
        return Checkpoint(GGUFFile(found, own_folder=cache_folder() / "models"), name)
    try:
        return Checkpoint.in_folder(download(found), name)
    except CheckpointError as error:
        raise type(error)(explain_absence(name, str(error).rstrip("."))) from error


def _open_path(path: Path, name: str) -> Checkpoint:
    """A GGUF file; or a folder in Hugging Face's format, or else the GGUF file in it."""
    if path.is_file() and path.suffix == SUFFIX:
        return Checkpoint(GGUFFile(path), name)
    if not path.is_dir():
        raise CheckpointError(
            f"{name} is a file, and no GGUF file; give the folder that holds config.json and the weights"
        )
    if not any(path.glob("*.safetensors*")):
        file = find_gguf(path)
        if file is not None:
            return Checkpoint(GGUFFile(file), name)
    return Checkpoint.in_folder(path, name)
