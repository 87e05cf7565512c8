"""The frozen model, and what a pass through it leaves for the adapters.

Shapes: B samples, T tokens of a sample, D width, M = S H_kv D_head values of S layers, C = (A + 1) D + M channels of
the states of A exits and the last layer, and the values.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from layerskip.errors import UnsupportedModelError
from layerskip.training.exit_adapters.state_cache import StateCache
from layerskip.training.recipe.anatomy import Anatomy, first


@dataclass(kw_only=True)
class Pass:
    """What is kept of a pass through the frozen model."""

    states: dict[int, Tensor] = field(default_factory=dict)
    """Outputs [B, T, D] of the layers before the exits, and of the last one, by number of layers."""
    values: dict[int, Tensor] = field(default_factory=dict)
    """By layer whose values are read, [B, T, H_kv D_head]."""
    arguments: tuple[Any, ...] = ()
    """What the last layer was given besides the state, by position."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The same by name."""

    def all_values(self) -> Tensor | None:
        """[B, T, M], those of all layers; None where none are read."""
        return torch.cat(list(self.values.values()), -1) if self.values else None


class FrozenModel:
    """A model that isn't trained."""

    def __init__(self, anatomy: Anatomy, exits: Sequence[int], value_layers: Sequence[int]) -> None:
        """Say what is to be kept.

        Args:
            anatomy: The model's parts.
            exits: Number of layers before each exit.
            value_layers: Layers whose values are kept too.
        """
        self.anatomy = anatomy
        self._depths = (*exits, len(anatomy.layers))
        self._value_layers = tuple(value_layers)
        config = anatomy.model.config.get_text_config()
        heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
        self.hidden_size: int = config.hidden_size
        self._value_size = (kv_heads or heads) * (getattr(config, "head_dim", None) or self.hidden_size // heads)
        self.values_size = len(self._value_layers) * self._value_size
        """M."""
        self.state_cache: StateCache | None = None
        """Where passes are kept for the next time that a sample comes up."""

    @property
    def channels(self) -> int:
        """C."""
        return int(len(self._depths) * self.hidden_size + self.values_size)

    @torch.no_grad()
    def run(self, input_ids: Tensor, position_ids: Tensor | None) -> Pass:
        """A pass, without gradients; only what comes before the layers if the samples' states are kept.

        Args:
            input_ids: [B, T].
            position_ids: [B, T], from 0 in each example; counting up if not given.
        """
        if self.state_cache is None:
            return self._run(input_ids, position_ids, self._keeping)
        kept = self.state_cache.get(input_ids, position_ids)
        if kept is not None:
            found = self._run(input_ids, position_ids, self._skipping)
            self._split(kept.to(input_ids.device), found)
            return found
        found = self._run(input_ids, position_ids, self._keeping)
        everything = torch.cat((*(found.states[depth] for depth in self._depths), *found.values.values()), -1)
        self.state_cache.put(input_ids, position_ids, everything)
        return found

    def _split(self, kept: Tensor, found: Pass) -> None:
        """Take states and values [B, T, C] apart."""
        sizes = [self.hidden_size] * len(self._depths) + [self._value_size] * len(self._value_layers)
        parts = torch.split(kept, sizes, -1)
        found.states = dict(zip(self._depths, parts, strict=False))
        found.values = dict(zip(self._value_layers, parts[len(self._depths) :], strict=True))

    def _run(self, input_ids: Tensor, position_ids: Tensor | None, how: Callable[[Pass], Any]) -> Pass:
        found = Pass()
        options = {} if position_ids is None else {"position_ids": position_ids}
        # No autocast: the frozen weights are in their precision already, and would be converted at every call. No
        # cache: with one, transformers doesn't keep the examples of a block apart.
        with how(found), torch.autocast(input_ids.device.type, enabled=False):
            self.anatomy.model.get_decoder()(input_ids=input_ids, use_cache=False, **options)
        return found

    @contextmanager
    def _keeping(self, found: Pass) -> Iterator[None]:
        """Keep states, values and the last layer's arguments while the model runs."""
        layers: Any = self.anatomy.layers

        def keep_state(depth: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                found.states[depth] = first(output)

            return hook

        def keep_values(layer: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Tensor) -> None:
                found.values[layer] = output[..., -self._value_size :]  # the last part where q, k and v are one

            return hook

        with self._arguments(found):
            handles = [layers[depth - 1].register_forward_hook(keep_state(depth)) for depth in self._depths]
            for layer in self._value_layers:
                handles.append(_value_projection(layers[layer]).register_forward_hook(keep_values(layer)))
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    @contextmanager
    def _skipping(self, found: Pass) -> Iterator[None]:
        """Keep the last layer's arguments only, while the layers do nothing."""
        tuples = self.anatomy.layers_return_tuples

        def nothing(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (hidden_states,) if tuples else hidden_states

        with self._arguments(found):
            for layer in self.anatomy.layers:
                layer.forward = nothing
            try:
                yield
            finally:
                for layer in self.anatomy.layers:
                    del layer.forward

    @contextmanager
    def _arguments(self, found: Pass) -> Iterator[None]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            found.arguments = args[1:]
            found.options = {name: value for name, value in kwargs.items() if name != "hidden_states"}

        handle = self.anatomy.layers[-1].register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _value_projection(layer: nn.Module) -> nn.Module:
    """What makes a layer's values, alone or after queries and keys."""
    attention = getattr(layer, "self_attn", None)
    found = getattr(attention, "v_proj", None) or getattr(attention, "qkv_proj", None)
    if found is None:
        raise UnsupportedModelError(
            f"{type(layer).__name__} has no self_attn.v_proj, whose values an adapter could read; train it with "
            "adapter_value_layers 0"
        )
    return found  # type: ignore[no-any-return]
