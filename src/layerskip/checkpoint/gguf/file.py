"""A GGUF file as a checkpoint: configuration, weights and tokenizer, all from the file itself."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip.checkpoint.contents import Contents, share_of_types
from layerskip.errors import CheckpointError, CheckpointNotFoundError
from layerskip.text.tokenizer import TextTokenizer, Tokenizer

if TYPE_CHECKING:  # the other modules load the gguf package, which other checkpoints don't need
    from transformers import PreTrainedTokenizerBase

    from layerskip.checkpoint.gguf.container import Container
    from layerskip.checkpoint.gguf.tensors import GGUFTensors

SUFFIX = ".gguf"
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_PROJECTOR = "mmproj"
"""Beginning of the names of files with a model's image part, which are beside the model itself."""


@dataclass(frozen=True)
class GGUFFile:
    """A model in one file, or in numbered parts (`checkpoint.CheckpointFiles`)."""

    path: Path
    """The file, or its first part."""
    own_folder: Path | None = None
    """Folder for files that belong to the model, if not beside it: an installed package's folder isn't the user's."""

    @property
    def hugging_face_folder(self) -> None:
        """None: the file is in llama.cpp's format."""

    @property
    def tuned_file(self) -> Path:
        """File of a sweep's best setting; each model file has its own."""
        return (self.own_folder or self.path.parent) / f"{self.path.stem}.layerskip.json"

    @property
    def adapters_folder(self) -> Path:
        """Where exit adapters that belong to the model are; each model file has a folder of its own."""
        return (self.own_folder or self.path.parent) / f"{self.path.stem}.exit-adapters"

    @cached_property
    def container(self) -> "Container":
        """The header of the file, or of all its parts together."""
        from layerskip.checkpoint.gguf.container import join, read_container

        first = read_container(self.path)
        count = first.metadata.get("split.count", 1)
        if not isinstance(count, int) or count <= 1:
            return first
        if first.metadata.get("split.no", 0) != 0:
            raise CheckpointError(f"{self.path} is a later part of a model of {count} files; name the first one")
        return join([first, *(read_container(part) for part in _later_parts(self.path, count))])

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        """The metadata as a config.json."""
        from layerskip.checkpoint.gguf.config import read_raw_config

        return read_raw_config(self.container)

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """The metadata's end tokens as a generation_config.json."""
        from layerskip.checkpoint.gguf.config import read_generation_config

        return read_generation_config(self.container)

    @cached_property
    def weights(self) -> "GGUFTensors":
        """The tensors."""
        from layerskip.checkpoint.gguf.tensors import GGUFTensors

        return GGUFTensors(self.container, self.raw_config)

    @property
    def contents(self) -> Contents:
        """Bytes and types of the tensors."""
        container = self.container
        return Contents(
            format=f"GGUF version {container.version} ({container.metadata.get('general.architecture')})",
            num_bytes=container.num_bytes,
            types=share_of_types((tensor.type.name, tensor.num_bytes) for tensor in container.tensors.values()),
        )

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer that the metadata describes, as transformers has it.

        Raises:
            TokenizerError: The file has no tokenizer, or it can't be built.
        """
        from layerskip.checkpoint.gguf.tokenizer import build_tokenizer

        return build_tokenizer(self.container.plain_metadata())

    @property
    def text_tokenizer(self) -> Tokenizer:
        """The same without transformers; transformers' once somebody has asked for that, who may have changed it.

        Raises:
            TokenizerError: There is none, or it can't be made.
        """
        return self.tokenizer if "tokenizer" in vars(self) else self._own_tokenizer

    @cached_property
    def _own_tokenizer(self) -> TextTokenizer:
        from layerskip.checkpoint.gguf.tokenizer import build_text_tokenizer

        return build_text_tokenizer(self.container.plain_metadata())


def find_gguf(folder: Path) -> Path | None:
    """The GGUF file in a folder, or its first part; None if there is none.

    Raises:
        CheckpointError: There are several models.
    """
    files = sorted(file for file in folder.glob(f"*{SUFFIX}") if not file.name.startswith(_PROJECTOR))
    models = [file for file in files if (part := _PART.fullmatch(file.name)) is None or int(part["number"]) == 1]
    if len(models) > 1:
        raise CheckpointError(
            f"{folder} has {len(models)} GGUF files ({', '.join(file.name for file in models[:4])}"
            f"{', ...' if len(models) > 4 else ''}); name the one that you want, such as {models[0]}"
        )
    return models[0] if models else None


def _later_parts(path: Path, count: int) -> list[Path]:
    """Files of the later parts.

    Raises:
        CheckpointNotFoundError: A part is missing.
        CheckpointError: The file isn't named as a part.
    """
    part = _PART.fullmatch(path.name)
    if part is None or int(part["count"]) != count:
        raise CheckpointError(f"{path} is the first of {count} parts; it must be named NAME-00001-of-{count:05}.gguf")
    parts = [path.with_name(f"{part['stem']}-{number:05}-of-{count:05}.gguf") for number in range(2, count + 1)]
    for file in parts:
        if not file.is_file():
            raise CheckpointNotFoundError(f"{path} is the first of {count} parts, and {file.name} is missing beside it")
    return parts
