"""Running the first layers of a model, or the rest of them, with the model's own code around the layers.

A model's `forward` embeds tokens, prepares masks and rotary embeddings, calls one layer after another, and applies
norm, head and scalings; families differ in all of that. Here it stays as it is, and only the list of layers is another
one: in `early`, the layers after the exit return what they are given; in `late`, the layers up to the exit return the
states that were kept there. Both are copies of the modules from the model down to its list of layers. They share all
weights with the model, which itself stays unchanged.

Shapes: B rows, Q query tokens, D width, V vocabulary.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .shared_cache import SharedCache

ROLLED_BACK = {"full_attention", "sliding_attention", "chunked_attention"}
"""Types of layers, in a configuration's `layer_types`, whose state is keys and values of single tokens."""


class LayerRanges:
    """A model's first `exit_layer` layers, the rest of them, and all."""

    def __init__(self, model: Any, exit_layer: int) -> None:
        """Make the copies.

        Args:
            model: A causal language model of transformers.
            exit_layer: E, the number of layers that draft.

        Raises:
            ValueError: The model has no such exit, or its layers can't be run in parts.
        """
        decoder, name = _find_layers(model)
        layers = list(getattr(decoder, name))
        if not 1 <= exit_layer < len(layers):
            raise ValueError(
                f"exit_layer is {exit_layer}, and {type(model).__name__} has {len(layers)} layers; use 1 to "
                f"{len(layers) - 1}"
            )
        path = _path_to(decoder, model)
        self._exit = _Exit(layers[exit_layer - 1])
        skipped = [_Skipped(layer, self._exit) for layer in layers]
        early = [*layers[: exit_layer - 1], self._exit, *skipped[exit_layer:]]
        late = [*skipped[:exit_layer], *layers[exit_layer:]]
        self._all = _Caller(model)
        early_model, early_decoder = _with_layers(model, path, name, early)
        self._early, self._early_decoder = _Caller(early_model), _Caller(early_decoder)
        self._late = _Caller(_with_layers(model, path, name, late)[0])

    def run_all(self, tokens: Tensor, cache: SharedCache, positions: Tensor, mask: Tensor | None) -> Tensor:
        """All layers; the last token's logits.

        Args:
            tokens: [B, Q].
            cache: Keys and values, with `past` set.
            positions: [B, Q] or [1, Q].
            mask: [B, past + Q], whether a slot is no padding; None if none is.

        Returns:
            [B, V].
        """
        return self._all(tokens, cache, positions, mask, logits_to_keep=1).logits[:, -1]  # type: ignore[no-any-return]

    def run_early(self, tokens: Tensor, cache: SharedCache, positions: Tensor, mask: Tensor | None) -> Tensor:
        """The first layers without the head; the states at the exit, [B, Q, D]. Args as of `run_all`."""
        self._early_decoder(tokens, cache, positions, mask)
        return self._exit.states

    def draft(self, tokens: Tensor, cache: SharedCache, positions: Tensor, mask: Tensor | None) -> tuple[Any, Any]:
        """The first layers and the head; states at the exit and the last token's logits. Args as of `run_all`."""
        logits = self._early(tokens, cache, positions, mask, logits_to_keep=1).logits[:, -1]
        return self._exit.states, logits

    def verify(
        self, states: Sequence[Tensor], tokens: Tensor, cache: SharedCache, positions: Tensor, mask: Tensor | None
    ) -> Tensor:
        """The layers after the exit; all logits, [B, Q, V].

        Args:
            states: [B, 1, D] of each token, as the first layers returned them.
            tokens: [B, Q], of which only the shape matters.
            cache: As in `run_all`.
            positions: As in `run_all`.
            mask: As in `run_all`.
        """
        self._exit.states = torch.cat(list(states), dim=1)
        return self._late(tokens, cache, positions, mask).logits  # type: ignore[no-any-return]


class _Exit:
    """The last layer that drafts; keeps its output."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.output: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.output = self.layer(*args, **kwargs)
        return self.output

    def __getattr__(self, name: str) -> Any:  # models read attributes of layers, such as the type of attention
        return getattr(self.layer, name)

    @property
    def states(self) -> Tensor:
        """The hidden states in what the layer returned, which is a tuple in some families."""
        states: Tensor = self.output[0] if isinstance(self.output, tuple) else self.output
        return states

    @states.setter
    def states(self, states: Tensor) -> None:
        self.output = (states, *self.output[1:]) if isinstance(self.output, tuple) else states


class _Skipped:
    """Stands for a layer outside of the range: returns the exit's output."""

    def __init__(self, layer: nn.Module, exit_layer: _Exit) -> None:
        self.layer, self.exit_layer = layer, exit_layer

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self.exit_layer.output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


class _Caller:
    """Calls a module with the names that its `forward` has in this version of transformers."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._names = set(inspect.signature(type(module).forward).parameters)
        self._cache_name = "cache" if "cache" in self._names else "past_key_values"

    def __call__(
        self, tokens: Tensor, cache: SharedCache, positions: Tensor, mask: Tensor | None, **options: Any
    ) -> Any:
        arguments = {self._cache_name: cache, "position_ids": positions, "attention_mask": mask, **options}
        known = {name: value for name, value in arguments.items() if name in self._names}
        return self._module(input_ids=tokens, use_cache=True, return_dict=True, **known)


def _find_layers(model: Any) -> tuple[nn.Module, str]:
    """The module whose `forward` calls the layers, and the name of its list of layers."""
    kind = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise ValueError(f"{kind} has an encoder; self-speculative decoding is for models that are a decoder only")
    types = set(getattr(config, "layer_types", None) or ()) - ROLLED_BACK
    if types or getattr(model, "_is_stateful", False):
        raise ValueError(
            f"{kind} has layers with a state that rejected drafts can't be removed from "
            f"({', '.join(sorted(types)) or 'a recurrent one'}); generate without custom_generate"
        )
    if getattr(config, "num_kv_shared_layers", 0):
        raise ValueError(
            f"{kind} has layers that use the keys and values of others ({config.num_kv_shared_layers} of them), which "
            "can't be run in parts; generate without custom_generate"
        )
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for module in decoder.modules():  # from the outside in: experts may be lists of the same length
        names = [name for name, child in module._modules.items() if _is_list_of(config.num_hidden_layers, child)]
        if len(names) == 1:
            return module, names[0]
        if names:
            break
    raise ValueError(
        f"the layers of {kind} weren't found: no part of {type(decoder).__name__} has one list of "
        f"{config.num_hidden_layers} modules; generate without custom_generate"
    )


def _is_list_of(length: int, module: nn.Module | None) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) == length


def _path_to(decoder: nn.Module, model: nn.Module) -> list[str]:
    """Names of the modules from the model down to its decoder."""
    for name, module in model.named_modules():
        if module is decoder:
            return name.split(".") if name else []
    raise ValueError(f"{type(model).__name__}.get_decoder() returns a module that isn't part of the model")


def _with_layers(model: nn.Module, path: Sequence[str], name: str, layers: list[Any]) -> tuple[nn.Module, nn.Module]:
    """A copy of the model that shares its weights and has other layers, and the copy's decoder."""
    root = node = _shallow(model)
    for part in path:
        child = _shallow(node._modules[part])  # type: ignore[arg-type]
        node._modules[part] = child
        node = child
    del node._modules[name]
    node.__dict__[name] = layers  # a plain list: models slice it in each pass, and slicing a ModuleList is slow
    return root, node


def _shallow(module: nn.Module) -> nn.Module:
    """A copy that shares everything but the table of its children."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = dict(module._modules)
    # A forward that belongs to the instance (accelerate's), or that is compiled, would run the original's layers.
    twin.__dict__.pop("forward", None)
    twin.__dict__["_compiled_call_impl"] = None
    return twin
