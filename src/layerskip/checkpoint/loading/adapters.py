"""Exit adapters of a model: what describes them, their tensors' names, and whether they belong to a model.

An exit adapter is one more decoder layer, behind a projection and with a norm of its own, that was trained to predict
from the state at an exit what the frozen model predicts. It may also read values of
later layers (`model.torch.fusion`).

Shapes: N tokens that an adapter can draft.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from layerskip.checkpoint.loading.tensors import EMBEDDING, FINAL_NORM, Part, TensorSource, tensor_shapes
from layerskip.errors import InvalidArgumentError, WeightsError
from layerskip.model.config.model_config import ModelConfig

FORMAT = 2
"""Version of the files; later ones are refused."""
HASHED_ROWS = 8
"""Rows of each weight that the hash of a model covers."""


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The model that adapters were trained for."""

    name: str
    """What it was called then."""
    model_type: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    weights_hash: str
    """`hash_weights` of it."""


@dataclass(frozen=True, kw_only=True)
class AdapterDescription:
    """One adapter."""

    exit_layer: int
    """E: it reads the output of layer E - 1."""
    vocabulary_size: int | None = None
    """N tokens that it can draft, whose ids are stored with the weights; None: the whole vocabulary."""
    value_layers: tuple[int, ...] = ()
    """Later layers whose values it reads, from 0 (`model.torch.fusion`)."""
    agreement: float | None = None
    """Share of held-out tokens on which it agreed with the last layer."""
    by_confidence: tuple[tuple[int, int], ...] = ()
    """Of the held-out tokens, those on which it agreed, and all, by the class of its confidence
    (`model.drafts.confidence_class`)."""


@dataclass(frozen=True, kw_only=True)
class AdapterSet:
    """All adapters of one model."""

    base: BaseModel
    adapters: tuple[AdapterDescription, ...]
    training: Mapping[str, Any] = field(default_factory=dict)
    """How they were trained: recipe, data, tokens."""
    folder: Path | None = None
    """Where they were read from."""
    weights: TensorSource | None = None
    """Their tensors, where they were read."""

    def to_json(self) -> dict[str, Any]:
        """What `exit_adapters.json` holds."""
        adapters = [asdict(adapter) for adapter in self.adapters]
        return {"format": FORMAT, "base": asdict(self.base), "adapters": adapters, "training": dict(self.training)}


def tensor_name(exit_layer: int, name: str) -> str:
    """Name of an adapter's tensor, such as `exit_4.layer.self_attn.q_proj.weight`."""
    return f"exit_{exit_layer}.{name}"


def hash_weights(config: ModelConfig, source: TensorSource) -> str:
    """SHA-256 over the first rows of the embedding, the norm, and the matrices of three layers.

    The numbers are hashed as float32: the same weights in another dtype that holds them exactly, in another folder or
    under another name have the same hash.
    """
    digest = hashlib.sha256()
    layers = {f"model.layers.{index}." for index in (0, config.num_layers // 2, config.num_layers - 1)}
    for name, shape in sorted(tensor_shapes(config).items()):
        if name in (EMBEDDING, FINAL_NORM) or any(name.startswith(layer) for layer in layers):
            part = source.get(name, Part.rows(0, min(HASHED_ROWS, shape[0])))
            digest.update(name.encode())
            digest.update(part.to(torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def describe_base(name: str, config: ModelConfig, source: TensorSource) -> BaseModel:
    """What identifies a model."""
    return BaseModel(
        name=name,
        model_type=config.model_type,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        weights_hash=hash_weights(config, source),
    )


def read_token_ids(source: TensorSource, adapter: AdapterDescription, vocab_size: int) -> torch.Tensor | None:
    """[N] ids that an adapter can draft; None: all.

    Raises:
        WeightsError: They aren't ids of the vocabulary, or not as many as described.
    """
    if adapter.vocabulary_size is None:
        return None
    name = tensor_name(adapter.exit_layer, "token_ids")
    ids = source.get(name) if name in source.names() else torch.zeros(0, dtype=torch.long)
    ids = ids.long()
    if ids.shape != (adapter.vocabulary_size,) or int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise WeightsError(
            f"tensor {name!r} must hold {adapter.vocabulary_size} ids from 0 to {vocab_size - 1}; "
            "train the adapters anew"
        )
    return ids


def check_kind(config: ModelConfig, name: str) -> None:
    """Raise `InvalidArgumentError` if a model can't have exit adapters, which are layers of its own kind with an MLP.

    Args:
        config: Its sizes and switches.
        name: What the user called the model.
    """
    if config.sparse_layers:
        raise InvalidArgumentError(
            f"exit adapters are decoder layers with an MLP, and {name} ({config.model_type}) has layers with experts: "
            "adapters can be neither trained nor loaded for it; leave exit_adapters out"
        )


def check_base(adapters: AdapterSet, name: str, config: ModelConfig, source: TensorSource) -> None:
    """Raise `InvalidArgumentError` unless adapters were trained for this model.

    Args:
        adapters: The adapters.
        name: What the user called the model.
        config: Its sizes.
        source: Its tensors.
    """
    check_kind(config, name)
    base = adapters.base
    sizes = {
        "model_type": config.model_type,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
    }
    for field_name, value in sizes.items():
        if getattr(base, field_name) != value:
            raise InvalidArgumentError(
                f"the exit adapters in {adapters.folder} are for {base.name}, with {field_name} "
                f"{getattr(base, field_name)}, and {name} has {value}; leave them out (exit_adapters=None)"
            )
    for adapter in adapters.adapters:
        if adapter.exit_layer >= config.num_layers:
            raise InvalidArgumentError(
                f"the exit adapters in {adapters.folder} have one at exit {adapter.exit_layer}, and {name} has "
                f"{config.num_layers} layers; adapters are for exits 1 to {config.num_layers - 1}"
            )
        beyond = [layer for layer in adapter.value_layers if not 0 <= layer < config.num_layers]
        if beyond:
            raise InvalidArgumentError(
                f"the adapter at exit {adapter.exit_layer} in {adapters.folder} reads values of layer {beyond[0]}, and "
                f"{name} has layers 0 to {config.num_layers - 1}; train it anew"
            )
    if base.weights_hash != hash_weights(config, source):
        raise InvalidArgumentError(
            f"the exit adapters in {adapters.folder} were trained for {base.name}, whose weights differ from those of "
            f"{name}; train some for this model, or leave them out (exit_adapters=None)"
        )


def check_ends(adapters: AdapterSet, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
    """Raise `InvalidArgumentError` if an adapter can draft no token that ends a text, though the model has some."""
    assert adapters.weights is not None
    for adapter in adapters.adapters:
        ids = read_token_ids(adapters.weights, adapter, vocab_size)
        if ids is not None and eos_token_ids and not set(eos_token_ids) & set(ids.tolist()):
            raise InvalidArgumentError(
                f"the adapter at exit {adapter.exit_layer} in {adapters.folder} drafts among {len(ids)} tokens, and "
                f"none of them ends a text ({', '.join(map(str, eos_token_ids))}); train it anew"
            )
