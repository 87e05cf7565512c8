"""Experts of a layer that a file has in one tensor, as if they were stored one by one.

transformers computes with fused experts and saves them so with `save_original_format=False`; published checkpoints have
two or three tensors of each expert.

Shapes: E experts, D width, J width of an expert.
"""

from dataclasses import dataclass, replace
from typing import Never

from torch import Tensor

from layerskip.checkpoint.loading.tensors import Part, StoredTensor, TensorSource, expert_weights, stored_weights
from layerskip.errors import WeightsError
from layerskip.model.config.model_config import ModelConfig

ROUTER, GATE_UP, DOWN = "mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
"""Names of a layer's router [E, D] and its fused experts [E, 2 J, D] and [E, D, J]."""


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a tensor is in the file."""

    name: str
    expert: int | None = None
    """None: it is the whole tensor."""
    half: int | None = None
    """0: the gate, the first half of the rows; 1: up; None: all rows."""


class UnfusedExperts:
    """Tensors by the names of single experts, of a file with fused ones (a `TensorSource`)."""

    def __init__(self, source: TensorSource, config: ModelConfig) -> None:
        """Name every expert's part.

        Args:
            source: The file.
            config: Sizes and switches, of a family that has experts.
        """
        self._source = source
        self._num_experts = config.num_experts
        self._places = {name: _Place(name=name) for name in source.names()}
        for index in sorted(config.sparse_layers):
            prefix = f"model.layers.{index}."
            if not {prefix + GATE_UP, prefix + DOWN} <= source.names():
                continue
            for fused in (ROUTER, GATE_UP, DOWN):
                self._places.pop(prefix + fused, None)
            (router,) = stored_weights(config, sparse=True)["router"]
            if prefix + ROUTER in source.names():
                self._places[f"{prefix}{router}.weight"] = _Place(name=prefix + ROUTER)
            for expert in range(config.num_experts):
                names = expert_weights(config, expert)
                for half, name in enumerate(names["gate_up"]):
                    self._places[f"{prefix}{name}.weight"] = _Place(name=prefix + GATE_UP, expert=expert, half=half)
                self._places[f"{prefix}{names['down'][0]}.weight"] = _Place(name=prefix + DOWN, expert=expert)

    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._places)

    def stored(self, name: str) -> StoredTensor:
        """What the header says; an expert's part lies in one piece of the fused tensor."""
        place = self._places[name]
        stored = self._source.stored(place.name)
        if place.expert is None or len(stored.shape) != 3:
            return stored
        experts, rows, columns = stored.shape
        parts = 1 if place.half is None else 2
        return replace(stored, shape=(rows // parts, columns), num_bytes=stored.num_bytes // (experts * parts))

    def get(self, name: str, part: Part | None = None) -> Tensor:
        """A tensor, or only some of its rows or columns; of a fused one, a view of the mapped file."""
        place = self._places[name]
        if place.expert is None:
            return self._source.get(place.name, part)
        fused = self._source.get(place.name)
        if fused.dim() != 3 or len(fused) != self._num_experts:
            raise WeightsError(
                f"tensor {place.name!r} has shape {tuple(fused.shape)}; config.json asks for {self._num_experts} "
                "experts of two dimensions"
            )
        tensor = fused[place.expert]
        if place.half is not None:
            if len(tensor) % 2:
                raise WeightsError(f"tensor {place.name!r} has {len(tensor)} rows for each expert's gate and up")
            tensor = tensor.chunk(2)[place.half]
        if part is None:
            return tensor
        part.check(name, tuple(tensor.shape))
        return tensor.narrow(part.dim, part.start, part.stop - part.start)

    def block_format(self, name: str) -> None:
        """None: files with fused experts have no blocks."""

    def blocks(self, name: str, part: Part | None = None) -> Never:
        """Nothing has blocks."""
        raise AssertionError(name)


def with_single_experts(source: TensorSource, config: ModelConfig) -> TensorSource:
    """The tensors of a checkpoint with a name for each expert's, however the file has them."""
    fused = any(name.endswith((GATE_UP, DOWN)) for name in source.names())
    return UnfusedExperts(source, config) if fused else source
