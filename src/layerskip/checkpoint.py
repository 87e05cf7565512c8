"""Checkpoints on disk: a hub id, a folder or `demo` -> configuration, memory-mapped weights, tokenizer."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerskip.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    InvalidArgumentError,
    OutOfMemoryError,
    TokenizerError,
    WeightsError,
)
from layerskip.hub import download
from layerskip.loading import LoadingConfig
from layerskip.model.cache import free_memory
from layerskip.model.compiled_rounds import RoundMode, why_not_compile
from layerskip.model.config import ModelConfig, read_eos
from layerskip.model.decoder import Decoder
from layerskip.model.drafts import DraftWeights, frequent_tokens
from layerskip.model.families import parse_config
from layerskip.model.native_network import why_not_native
from layerskip.model.quantization import check_quantization
from layerskip.model.weights import load_decoder, tensor_shapes
from layerskip.tuned import TunedSettings, read_tuned

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEMO_NAME = "demo"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """A folder in Hugging Face's format: config.json, safetensors, tokenizer."""

    folder: Path
    name: str
    """What the user called it."""

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        """Contents of config.json."""
        path = self.folder / "config.json"
        if not path.is_file():
            raise CheckpointError(f"{self.folder} is not a checkpoint: it has no config.json")
        return _read_json(path)

    @cached_property
    def config(self) -> ModelConfig:
        """The model's sizes and switches."""
        return parse_config(self.raw_config)

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a text: generation_config.json's, or else config.json's."""
        path = self.folder / "generation_config.json"
        return (read_eos(_read_json(path)) if path.is_file() else ()) or self.config.eos_token_ids

    @cached_property
    def tuned(self) -> TunedSettings | None:
        """What a sweep found best for this checkpoint, if there was one."""
        return read_tuned(self.folder, self.config.num_layers)

    @property
    def num_parameters(self) -> int:
        """Weights of the network; a tied head counts once."""
        return sum(torch.Size(shape).numel() for shape in tensor_shapes(self.config).values())

    @cached_property
    def weights(self) -> "SafetensorsFiles":
        """The checkpoint's tensors."""
        return SafetensorsFiles(find_weight_files(self.folder))

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The checkpoint's tokenizer.

        Raises:
            TokenizerError: There is none, or it can't be read.
        """
        from transformers import AutoTokenizer

        files = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
        if not any((self.folder / file).is_file() for file in files):
            raise TokenizerError(
                f"{self.folder} has no tokenizer (tokenizer.json); copy the one that the model was trained with there, "
                "or pass token ids in place of text"
            )
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except Exception as error:  # transformers raises nearly anything here, from KeyError to bare Exception
            raise TokenizerError(f"the tokenizer in {self.folder} can't be read: {error}") from error
        return tokenizer

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
        how, config = loading or LoadingConfig(), self.config
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
        self._check_memory(dtype.itemsize if how.quantize is None else 1, dtype, device)
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

    def _draft_weights(self, how: LoadingConfig) -> DraftWeights | None:
        tokens = None
        if how.draft_vocabulary is not None:
            tokens = self._frequent_tokens(how.draft_vocabulary, how.draft_text)
        elif how.draft_text is not None:
            raise InvalidArgumentError("draft_text ranks tokens for draft_vocabulary; give that as well")
        return DraftWeights(quantize=how.quantize_draft, tokens=tokens) if how.quantize_draft or tokens else None

    def _check_memory(self, bytes_each: int, dtype: torch.dtype, device: torch.device) -> None:
        needed, free = self.num_parameters * bytes_each, free_memory(device)
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
            found = self.tokenizer(content, add_special_tokens=False)["input_ids"]
        return frequent_tokens(found, count, size, self.eos_token_ids)


class SafetensorsFiles:
    """Tensors by name from one or more safetensors files, memory-mapped (`model.weights.TensorSource`)."""

    def __init__(self, files: dict[str, Path | None]) -> None:
        """Read the files' headers.

        Args:
            files: File of each tensor; or one entry `"": file` whose tensors are all taken.

        Raises:
            WeightsError: A file is missing, truncated or not safetensors, or lacks a tensor that the index names.
        """
        self._file_of: dict[str, Path] = {}
        paths = {path for path in files.values() if path is not None}
        present = {path: _tensor_names(path) for path in sorted(paths)}
        if "" in files:
            self._file_of = {name: path for path in paths for name in present[path]}
            return
        for name, path in files.items():
            if path is None or name not in present[path]:
                raise WeightsError(f"the index names tensor {name!r} in {path}, which doesn't have it")
            self._file_of[name] = path

    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._file_of)

    def get(self, name: str) -> Tensor:
        """One tensor, in a mapping of its own.

        Tensors that are read through one handle share a mapping of the whole file, and the pages of those that were
        copied long ago would stay resident until the last of them goes.
        """
        from safetensors import safe_open

        with safe_open(self._file_of[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def open_checkpoint(name: str, *, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint by name, downloading it if it is a hub id.

    Args:
        name: `demo` (the embedded model), a folder, or a hub id (`owner/name`).
        revision: Branch, tag or commit of a hub repository.

    Raises:
        CheckpointNotFoundError: There is no such thing.
        GatedRepositoryError: Access has to be requested first.
    """
    if not name:
        raise CheckpointNotFoundError("no model was named; give 'demo', a folder, or a hub id such as 'owner/name'")
    if name == DEMO_NAME:
        return Checkpoint(Path(__file__).parent / "assets" / "demo", name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Checkpoint(folder, name)
    if folder.exists():
        raise CheckpointError(f"{name} is a file; give the folder that holds config.json and the weights")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointNotFoundError(
            f"there is no folder {name!r}, and it isn't a hub id ('owner/name') or 'demo' either"
        )
    return Checkpoint(download(name, revision), name)


def find_weight_files(folder: Path) -> dict[str, Path | None]:
    """Which safetensors file holds which tensor (`""` for all, where there is one file).

    Raises:
        WeightsError: No safetensors, only pickles, a broken index, or a shard that is missing.
    """
    if (folder / WEIGHTS_FILE).is_file():  # where there are both, transformers takes this one too
        return {"": folder / WEIGHTS_FILE}
    index = folder / INDEX_FILE
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise WeightsError(f"{index} has no 'weight_map' of tensors to files; download the checkpoint again")
        missing = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
        if missing:
            raise WeightsError(f"{len(missing)} weight files named by {index} are missing, first {missing[0]!r}")
        return {name: folder / file for name, file in weight_map.items()}
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise WeightsError(
            f"{folder} has only pickled weights ({pickles[0]}), which can run code when they are read; convert them "
            "with transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    raise WeightsError(f"{folder} has no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}")


def choose_device(device: str) -> torch.device:
    """The named device, or for `auto` a CUDA GPU if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InvalidArgumentError(f"device {device!r} is not known; use auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InvalidArgumentError(f"device {device!r}: this machine has {torch.cuda.device_count()} usable CUDA GPUs")
    if chosen.type not in ("cpu", "cuda"):
        raise InvalidArgumentError(f"device {device!r} is not supported; use auto, cpu, cuda or cuda:N")
    return chosen


def choose_dtype(dtype: str, device: torch.device, raw_config: dict[str, Any]) -> torch.dtype:
    """The named dtype, or for `auto` float32 on a CPU and the checkpoint's own elsewhere."""
    if dtype == "auto":
        own = raw_config.get("dtype") or raw_config.get("torch_dtype") or "float32"
        return torch.float32 if device.type == "cpu" else DTYPES.get(own, torch.float32)
    if dtype not in DTYPES:
        raise InvalidArgumentError(f"dtype {dtype!r} is not supported; use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def choose_kernels(kernels: str, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether compiled kernels run the network: `native` insists on them, `auto` takes them where they can."""
    if kernels not in ("auto", "native", "torch"):
        raise InvalidArgumentError(f"kernels {kernels!r} are not known; use auto, native or torch")
    obstacle = why_not_native(config, device, dtype)
    if kernels == "native" and obstacle is not None:
        raise InvalidArgumentError(f"kernels 'native' can't run this model: {obstacle}; use auto or torch")
    return kernels != "torch" and obstacle is None


def choose_rounds(compile: str, kernels: str, device: torch.device) -> RoundMode:
    """How whole greedy rounds run.

    Args:
        compile: `auto`: CUDA graphs on CUDA, nothing on a CPU, where native kernels are faster than what
            `torch.compile` makes; `off`; `max`: `torch.compile`, whose result is captured on CUDA.
        kernels: The kernels that were asked for.
        device: Where the network runs.

    Raises:
        InvalidArgumentError: An unknown value, or `max` where that isn't possible.
    """
    if compile not in ("auto", "off", "max"):
        raise InvalidArgumentError(f"compile {compile!r} is not known; use auto, off or max")
    if compile != "max":
        return "graphs" if compile == "auto" and device.type == "cuda" else "off"
    if kernels == "native":
        raise InvalidArgumentError("compile 'max' compiles torch's operators, and kernels 'native' has none; drop one")
    obstacle = why_not_compile(device)
    if obstacle is not None:
        raise InvalidArgumentError(f"compile 'max' can't be used here: {obstacle}; use auto or off")
    return "max"


def choose_context(config: ModelConfig, max_context: int | None) -> int:
    """Longest sequence in tokens to prepare for."""
    limit = config.max_position_embeddings
    if max_context is None:
        originals = [r.original_max_position_embeddings for r in config.ropes.values() if r.rope_type == "longrope"]
        return min([limit, *originals])
    if not 1 <= max_context <= limit:
        raise InvalidArgumentError(f"max_context {max_context} is outside 1..{limit}, the model's context in tokens")
    return max_context


def _tensor_names(path: Path) -> frozenset[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return frozenset(file.keys())
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} can't be read as safetensors ({error}); it is truncated or not in that format: download it again"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content
