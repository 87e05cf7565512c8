"""A checkpoint of which only headers are read: what loading it would need is known before it is loaded."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Never

from layerskip.checkpoint.checkpoint import Checkpoint
from layerskip.checkpoint.loading.adapters import AdapterSet
from layerskip.checkpoint.loading.tensors import HEAD, Part, StoredTensor, TensorSource
from layerskip.model.blocks import BlockFormat
from layerskip.model.config.model_config import ModelConfig
from layerskip.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class UnreadCheckpoint:
    """A checkpoint as `plan.choose_plan` takes it (`plan.LoadableCheckpoint`), whose tensors can't be read."""

    checkpoint: Checkpoint

    @property
    def name(self) -> str:
        """What the user called it."""
        return self.checkpoint.name

    @property
    def raw_config(self) -> dict[str, Any]:
        """config.json in Hugging Face's terms."""
        return self.checkpoint.raw_config

    @property
    def network_config(self) -> ModelConfig:
        """Sizes and switches; a head in the files is taken to differ from the embedding, as nearly all do."""
        config = self.checkpoint.config
        return replace(config, tie_word_embeddings=False) if HEAD in self.weights.names() else config

    @property
    def weights(self) -> TensorSource:
        """Headers of the tensors."""
        return _Headers(self.checkpoint.weights)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a sequence."""
        return self.checkpoint.eos_token_ids

    @property
    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        return self.checkpoint.text_tokenizer

    def find_exit_adapters(self, where: str | Path | None) -> AdapterSet | None:
        """The exit adapters; whether they were trained for this model isn't known without its weights."""
        return self.checkpoint.named_exit_adapters(where)


@dataclass(frozen=True)
class _Headers:
    """Headers of tensors (`tensors.TensorSource`)."""

    source: TensorSource

    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return self.source.names()

    def stored(self, name: str) -> StoredTensor:
        """What the header says of a tensor."""
        return self.source.stored(name)

    def block_format(self, name: str) -> BlockFormat | None:
        """The blocks that hold the tensor's numbers."""
        return self.source.block_format(name)

    def get(self, name: str, part: Part | None = None) -> Never:
        """Tensors aren't read."""
        raise AssertionError(name)

    def blocks(self, name: str, part: Part | None = None) -> Never:
        """Nor are their blocks."""
        raise AssertionError(name)
