"""Checkpoints: a name, a folder or a hub id -> configuration, memory-mapped weights, tokenizer, network."""

from dataclasses import dataclass
from functools import cached_property
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from layerskip.checkpoint.contents import Contents
from layerskip.checkpoint.exit_adapters import has_adapters, read_adapters
from layerskip.checkpoint.folder import HuggingFaceFolder
from layerskip.checkpoint.gguf.file import SUFFIX, GGUFFile, find_gguf
from layerskip.checkpoint.hub import download
from layerskip.checkpoint.known_file import Report
from layerskip.checkpoint.loading.adapters import AdapterSet, check_base, check_ends, describe_base
from layerskip.checkpoint.loading.config import LoadingConfig
from layerskip.checkpoint.loading.experts import with_single_experts
from layerskip.checkpoint.loading.network import load_decoder
from layerskip.checkpoint.loading.plan import plan_loading
from layerskip.checkpoint.loading.tensors import TensorSource, parameter_count, with_own_head
from layerskip.checkpoint.names import MODELS, explain_absence, resolve
from layerskip.checkpoint.tuned import TunedSettings, read_tuned
from layerskip.errors import CheckpointError, CheckpointNotFoundError, InvalidArgumentError, TokenizerError
from layerskip.files import cache_folder
from layerskip.model.config.families import FAMILIES, parse_config
from layerskip.model.config.model_config import ModelConfig, read_eos
from layerskip.model.config.values import shown
from layerskip.model.decoder import Decoder
from layerskip.model.native.threads import settle_threads
from layerskip.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEMO_NAME = "demo"
ASSETS = Path(__file__).parents[1] / "assets"
DEMO_FOLDER = ASSETS / "demo"
WAYS_TO_NAME = f"{', '.join([repr(DEMO_NAME), *map(repr, MODELS)])}, a folder, a GGUF file, or a hub id ('owner/name')"
"""What a model can be called, for messages."""


class CheckpointFiles(Protocol):
    """What a checkpoint consists of, in whatever format; each part is read when it is first asked for."""

    @property
    def hugging_face_folder(self) -> Path | None:
        """The folder that transformers can read; None where the checkpoint is in another format."""
        ...

    @property
    def tuned_file(self) -> Path:
        """Where a sweep keeps the best setting (`tuned.py`)."""
        ...

    @property
    def adapters_folder(self) -> Path:
        """Where exit adapters that belong to the model are."""
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
    def hugging_face_folder(self) -> Path | None:
        """The folder that transformers can read; None where the checkpoint is in another format."""
        return self.files.hugging_face_folder

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
        """Ids that end a sequence: generation_config.json's; else config.json's; else the tokenizer's end token.

        As in transformers, the tokenizer's end token only counts where neither file names any (vLLM and llama.cpp add
        it to those of the files). An answer in a conversation also ends with the token that ends a turn:
        `LanguageModel.end_tokens`.
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
        return parameter_count(self.network_config)

    @cached_property
    def weights(self) -> TensorSource:
        """The checkpoint's tensors."""
        family = FAMILIES.get(str(self.raw_config.get("model_type")))
        if family is None or family.experts is None:
            return self.files.weights
        return with_single_experts(self.files.weights, self.config)

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

    def find_exit_adapters(self, where: str | Path | None = "auto") -> AdapterSet | None:
        """The exit adapters in a folder, or with `auto` those that belong to this checkpoint.

        Those are in the checkpoint's own folder; for a named model they may also come with this package.

        Returns:
            None if none are wanted (`where` is None), or with `auto` if there are none.

        Raises:
            InvalidArgumentError: They were trained for another model.
            CheckpointError: The folder has none, or they can't be read.
        """
        adapters = self.named_exit_adapters(where)
        if adapters is None:
            return None
        if adapters.folder == self._embedded_folder:  # for a named model, if the file is the one they were made for
            fits = adapters.base == describe_base(adapters.base.name, self.network_config, self.weights)
            return adapters if fits else None
        check_base(adapters, self.name, self.network_config, self.weights)
        check_ends(adapters, self.config.vocab_size, self.eos_token_ids)
        return adapters

    def named_exit_adapters(self, where: str | Path | None = "auto") -> AdapterSet | None:
        """The same without a look at the weights: the adapters may have been trained for another model."""
        if where is None:
            return None
        if where != "auto":
            return read_adapters(Path(where).expanduser())
        if has_adapters(self.files.adapters_folder):
            return read_adapters(self.files.adapters_folder)
        embedded = self._embedded_folder
        return read_adapters(embedded) if embedded is not None and has_adapters(embedded) else None

    @property
    def _embedded_folder(self) -> Path | None:
        """The folder in this package with what comes for a named model."""
        return ASSETS / self.name if self.name in MODELS else None

    def load_decoder(self, config: LoadingConfig | None = None) -> Decoder:
        """Load the network.

        Args:
            config: How; as the defaults say if not given.

        Raises:
            InvalidArgumentError: Unknown dtype or device, a context beyond the model's, kernels that can't run it, or
                rounds that can't be compiled.
            OutOfMemoryError: The weights don't fit.
            CheckpointError: Anything wrong with the files.
        """
        config = config or LoadingConfig()
        plan = plan_loading(self, config)
        if plan.device.type == "cpu":
            settle_threads(config.threads)
        return load_decoder(self.network_config, self.weights, plan)

    def _tokenizer_eos(self) -> tuple[int, ...]:
        try:
            tokenizer = self.text_tokenizer
        except TokenizerError:
            return ()
        name = tokenizer.special_tokens_map.get("eos_token")
        ids = [] if name is None else tokenizer.convert_tokens_to_ids([name])
        return tuple(token_id for token_id in ids if token_id is not None and token_id < self.config.vocab_size)


def open_checkpoint(name: str, *, revision: str | None = None, report: Report | None = None) -> Checkpoint:
    """Find a checkpoint by name, downloading it if it is a hub id.

    Args:
        name: `demo` (the embedded model), a model of `names.MODELS` (`smollm2`, `gemma3-270m`), a folder, a GGUF file,
            or a hub id (`owner/name`).
        revision: Branch, tag or commit of a hub repository; of a named model it asks for the hub's.
        report: Called with the progress of checking a named model's files and putting them together, in bytes.

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
    source = resolve(name, report)
    if isinstance(source, Path):
        return Checkpoint(GGUFFile(source, own_folder=cache_folder() / "models"), name)
    try:
        return Checkpoint.in_folder(download(source), name)
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
