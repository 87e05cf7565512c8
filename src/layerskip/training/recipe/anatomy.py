"""Finds the parts of transformers' causal models that the recipe needs: decoder layers, final norm, LM head."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from layerskip.errors import UnsupportedModelError
from layerskip.training.recipe.exit_loss import Head

LAYER_NAMES = ("layers", "h", "blocks")
NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f")
TOLERANCE = 2e-2
"""Largest relative difference between our logits and the model's that counts as rounding in the model's precision."""


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The parts of a causal language model."""

    model: Any
    """The causal model itself, without adapters' wrappers."""
    layers: Sequence[nn.Module]
    head: Head
    layers_return_tuples: bool = False
    adapted: bool = False
    """Whether peft wraps the model."""


def dissect(model: nn.Module) -> Anatomy:
    """Find the parts, and check on two tokens that norm and LM head give the model's own logits.

    Raises:
        UnsupportedModelError: A part isn't in the usual place of transformers' decoders, or the model computes its
            logits in another way.
    """
    causal: Any = model
    while hasattr(causal, "get_base_model"):  # peft
        causal = causal.get_base_model()
    kind = type(causal).__name__
    if not hasattr(causal, "get_decoder") or not hasattr(causal, "get_output_embeddings"):
        raise UnsupportedModelError(f"{kind} is not a causal language model of transformers; give one, as Llama's is")
    decoder, linear = causal.get_decoder(), causal.get_output_embeddings()
    layers = _attribute(decoder, LAYER_NAMES)
    norm = _attribute(decoder, NORM_NAMES)
    if not isinstance(layers, nn.ModuleList) or not len(layers) or norm is None or linear is None:
        missing = "LM head" if linear is None else "final norm" if norm is None else "decoder layers"
        raise UnsupportedModelError(
            f"{kind} has no {missing} that can be reached; models need a list of layers named "
            f"{', '.join(LAYER_NAMES)} and a norm named {', '.join(NORM_NAMES)}, as Llama and Qwen have"
        )
    if "alibi" in signature(layers[0].forward).parameters:
        raise UnsupportedModelError(
            f"{kind} passes its layers a bias of all samples and heads together (ALiBi), from which samples can't be "
            "dropped; use a model with rotary or learned positions"
        )
    config = causal.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    softcap = getattr(config, "final_logit_softcapping", None)
    anatomy = Anatomy(
        model=causal,
        layers=list(layers),
        head=Head(norm=norm, linear=linear, scale=scale, softcap=softcap),
        adapted=causal is not model,
    )
    if next(causal.parameters()).is_meta:  # the weights are loaded later, so there is nothing to compare yet
        return anatomy
    return replace(anatomy, layers_return_tuples=isinstance(_probe(anatomy, kind), tuple))


def _attribute(module: Any, names: Sequence[str]) -> Any:
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


@torch.no_grad()
def _probe(anatomy: Anatomy, kind: str) -> Any:
    """The last layer's output for two tokens; raises if norm and LM head don't turn it into the model's logits."""
    device = next(anatomy.model.parameters()).device
    found: list[Any] = []
    handle = anatomy.layers[-1].register_forward_hook(lambda module, args, output: found.append(output))
    modes = {module: module.training for module in anatomy.model.modules()}
    try:
        tokens = torch.tensor([[0, 1]], device=device)
        logits = anatomy.model.eval()(input_ids=tokens, use_cache=False).logits.float()
    finally:
        handle.remove()
        for module, mode in modes.items():
            module.training = mode
    ours = anatomy.head(first(found[0])) if found else torch.full_like(logits, torch.inf)
    difference = (ours - logits).abs().max() / logits.abs().max().clamp(min=1e-6)
    if not difference <= TOLERANCE:
        raise UnsupportedModelError(
            f"{kind} does not compute its logits as head(norm(last layer's output)), so exits can't share them; "
            "models such as Llama, Mistral, Qwen, Gemma and Phi-3 do"
        )
    return found[0]


def first(output: Any) -> Tensor:
    """Hidden states from a layer's output, which is the tensor itself or a tuple that begins with it."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
