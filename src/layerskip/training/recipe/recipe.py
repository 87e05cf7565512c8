"""The LayerSkip recipe on a transformers model: layer dropout and early-exit losses, attached to the model.

    recipe = LayerSkipRecipe(model, LayerSkipConfig(dropout_max=0.1), seed=0)
    recipe.begin_step(step, num_steps)
    model(input_ids=..., labels=...).loss.backward()            # J of the paper, with layers dropped

In evaluation mode the model computes as usual; `recipe.measure()` collects the quality of each exit meanwhile.

Shapes: B samples, T tokens of a sample, N = B x T, D width, L layers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerskip.training.config import LayerSkipConfig
from layerskip.training.data.packing import IGNORED
from layerskip.training.recipe.anatomy import dissect, first
from layerskip.training.recipe.curriculum import enabled_exits, exit_weights
from layerskip.training.recipe.exit_loss import EXIT_LOSSES, JointLoss, learned_tokens
from layerskip.training.recipe.exit_statistics import ExitStatistics
from layerskip.training.recipe.layer_dropout import draw_kept, dropout_rates
from layerskip.training.recipe.liger import liger_cross_entropy

CHUNK_LOGITS_CPU, CHUNK_LOGITS_GPU = 2**21, 2**27
"""Logits that exist at the same time: few enough for a CPU's caches, many enough to keep a GPU busy."""
MOST_LOGITS_CPU = 2**26
"""The same where the vocabulary is large."""
ROWS_BY_WIDTH = 2
"""Tokens of a chunk at least, in channels of the model. Each chunk adds to the gradient of the head, V x D numbers that
are read and written; its logits, about six times n x V numbers, should be most of what it moves."""


@dataclass(kw_only=True)
class _Forward:
    """State of one pass through the model."""

    labels: Tensor
    """[B, T], the token that follows each, or IGNORED."""
    num_items: Tensor | float
    exits: frozenset[int]
    """Layers whose output is kept."""
    kept: list[Tensor | None] = field(default_factory=list)
    """Samples that each layer runs, None for all of them; empty without dropout."""
    states: dict[int, Tensor] = field(default_factory=dict)
    """Outputs [B, T, D] of these layers."""
    loss: Tensor | None = None
    done: bool = False
    """Whether only recomputation for gradient checkpointing follows: the same samples are dropped, nothing is
    collected."""


class LayerSkipRecipe:
    """Applies the recipe to a model while attached."""

    def __init__(self, model: nn.Module, config: LayerSkipConfig, *, seed: int = 0) -> None:
        """Attach to a model.

        Args:
            model: A causal model of transformers, bare or with peft's adapters, before it is wrapped for distributed
                training.
            config: The recipe.
            seed: Seed of layer dropout.

        Raises:
            UnsupportedModelError: The model's layers, norm or head can't be reached.
            InvalidArgumentError: An exit that the model doesn't have, or a rotation larger than the number of exits.
        """
        anatomy = dissect(model)
        self.config = config
        self.model: Any = anatomy.model
        self.num_layers = len(anatomy.layers)
        self.exits = config.exits_for(self.num_layers)
        self.rotation = config.rotation_for(self.num_layers)
        self._seed = seed
        self._head = anatomy.head
        self._tuples = anatomy.layers_return_tuples
        self._forward: _Forward | None = None
        self._statistics: ExitStatistics | None = None
        self._handles = [anatomy.head.linear.register_forward_hook(self._after_head)]
        if anatomy.adapted:  # peft before 0.21 calls `forward` itself, past all hooks
            self.model.layerskip = self
            self.model.layerskip_forward = vars(anatomy.model).get("forward")
            self.model.forward = MethodType(_make_model_forward(type(anatomy.model)), anatomy.model)
        else:
            self._handles.append(anatomy.model.register_forward_pre_hook(self._before_model, with_kwargs=True))
            self._handles.append(anatomy.model.register_forward_hook(self._after_model))
        self._layers: list[Any] = list(anatomy.layers)
        for i, layer in enumerate(self._layers):
            layer.layerskip = (self, i)
            layer.layerskip_forward = vars(layer).get("forward")  # the class's own, unless another library changed it
            layer.forward = MethodType(_enter_layer, layer)
        self.head_cost = _num_weights(anatomy.head.linear) / max(1, _num_weights(self._layers[-1]))
        """Weights of the LM head divided by the weights of a layer."""
        self.begin_step(0, 1)

    def detach(self) -> None:
        """Restore the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        adapted = [self.model] if "layerskip" in vars(self.model) else []
        for module in [*self._layers, *adapted]:
            own = module.layerskip_forward
            del module.layerskip, module.layerskip_forward, module.forward
            if own is not None:
                module.forward = own
        self._layers.clear()

    def begin_step(self, step: int, num_steps: int, *, rank: int = 0, world_size: int = 1) -> None:
        """Set the optimizer step of the next forward passes.

        Args:
            step: t, from 0.
            num_steps: T.
            rank: Index of this process's part of the global batch.
            world_size: Number of parts, each with the same number of samples.
        """
        config, num_layers = self.config, self.num_layers
        enabled = enabled_exits(
            step, num_steps=num_steps, exits=self.exits, curriculum=config.curriculum, rotation=self.rotation
        )
        self.weights = exit_weights(enabled, num_layers, config.exit_loss_scale, config.exit_weights)
        self.rates = dropout_rates(
            step,
            num_steps=num_steps,
            num_layers=num_layers,
            dropout_max=config.dropout_max,
            schedule=config.dropout_schedule or "constant",
        )
        self._step, self._num_samples = step, 0
        self._rank, self._world_size = rank, world_size

    @contextmanager
    def measure(self) -> Iterator[ExitStatistics]:
        """Collect loss and agreement of every exit from passes in evaluation mode that have labels."""
        self._statistics = ExitStatistics(self.num_layers)
        try:
            yield self._statistics
        finally:
            self._statistics = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        self._forward = None
        labels = kwargs.get("labels")
        if labels is None or (not module.training and self._statistics is None):
            return None
        following = kwargs.get("shift_labels")
        if following is None:
            following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        if not module.training:
            self._forward = _Forward(labels=following, num_items=1.0, exits=frozenset(range(self.num_layers)))
            return None
        kwargs = dict(kwargs)
        num_items = kwargs.pop("num_items_in_batch", None)
        self._forward = _Forward(
            labels=following,
            num_items=(following != IGNORED).sum() if num_items is None else num_items,
            exits=frozenset(self.weights),
            kept=self._draw(labels.shape[0], labels.device),
        )
        # The model's own loss is replaced, so logits for a single position are enough.
        kwargs.update(labels=None, logits_to_keep=1, use_cache=False)
        kwargs.pop("shift_labels", None)
        return args, kwargs

    def _draw(self, batch_size: int, device: torch.device) -> list[Tensor | None]:
        start = self._num_samples + self._rank * batch_size
        self._num_samples += batch_size * self._world_size
        if not any(self.rates):
            return []
        kept = draw_kept(self.rates, seed=self._seed, step=self._step, samples=range(start, start + batch_size))
        return [None if layer.all() else layer.nonzero().flatten().to(device, non_blocking=True) for layer in kept.T]

    def _run_layer(self, i: int, run: Callable[..., Any], hidden: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        forward = self._forward
        if forward is None:
            return run(hidden, *args, **kwargs)
        # Code that calls the decoder without the model, in evaluation mode, finds the last training pass's samples
        # here.
        rows = forward.kept[i] if forward.kept and self.model.training else None
        if rows is None:
            output = run(hidden, *args, **kwargs)
        elif len(rows):
            select = partial(_select, rows=rows, batch_size=hidden.shape[0])
            output = run(select(hidden), *map(select, args), **{name: select(value) for name, value in kwargs.items()})
            hidden = hidden.index_copy(0, rows, first(output).to(hidden.dtype))
            output = (hidden, *output[1:]) if isinstance(output, tuple) else hidden
        else:  # zero gradients, not missing ones: with sharded layers, all processes reduce the same parameters
            trained = [parameter.sum() for parameter in self._layers[i].parameters() if parameter.requires_grad]
            hidden = hidden + torch.stack(trained).sum().to(hidden.dtype) * 0 if trained else hidden
            output = (hidden,) if self._tuples else hidden
        if i in forward.exits and not forward.done:
            forward.states[i] = first(output)
        return output

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after_head(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Compute the losses here, while mixed precision and gathered weights are those of the model's own LM head."""
        forward = self._forward
        if forward is None or forward.done:
            return
        labels = forward.labels.flatten()
        states = {i: state.flatten(0, 1) for i, state in forward.states.items()}
        places, learned = learned_tokens(labels)  # prompts and padding have no loss, and need no logits
        if len(places) < len(labels):
            states, labels = {i: state[places] for i, state in states.items()}, learned
        width = next(iter(states.values())).shape[-1]
        chunk_tokens = tokens_of_chunk(output.shape[-1], width, on_cpu=labels.device.type == "cpu")
        if not module.training and self._statistics is not None:
            self._statistics.add(self._head, states, labels, chunk_tokens)
        else:
            loss = JointLoss(
                head=self._head,
                exit_loss=EXIT_LOSSES[self.config.exit_loss],
                stop_gradient=self.config.stop_gradient,
                chunk_tokens=chunk_tokens,
                fused=liger_cross_entropy(self._head, labels.device),
            )
            forward.loss = loss(states, self.weights, labels, forward.num_items)
        forward.states.clear()
        forward.done = True

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after_model(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._forward is None or self._forward.loss is None:
            return None
        loss, self._forward.loss = self._forward.loss, None
        balance = getattr(output, "aux_loss", None)
        if balance is not None:  # mixtures of experts: models add this to their own loss, which is replaced here
            loss = loss + self.model.config.get_text_config().router_aux_loss_coef * balance.to(loss.device)
        if isinstance(output, tuple):
            return (loss, *output)
        return type(output)(**{**output, "loss": loss})


def tokens_of_chunk(vocab_size: int, width: int, *, on_cpu: bool) -> int:
    """Tokens whose logits exist at the same time.

    Args:
        vocab_size: V.
        width: D.
        on_cpu: Whether they are computed on a CPU, where moving bytes is what takes time.
    """
    if not on_cpu:
        return max(64, CHUNK_LOGITS_GPU // vocab_size)
    enough = min(ROWS_BY_WIDTH * width, MOST_LOGITS_CPU // vocab_size)
    return max(64, CHUNK_LOGITS_CPU // vocab_size, enough)


def _num_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _select(value: Any, *, rows: Tensor, batch_size: int) -> Any:
    """Select the given samples in an argument of a layer."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() > 1 and value.shape[0] == batch_size else value
    if isinstance(value, (tuple, list)):
        return type(value)(_select(part, rows=rows, batch_size=batch_size) for part in value)
    return value


def _enter_layer(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`forward` of a layer while a recipe is attached; bound to the layer, so that copies of a model stay whole."""
    recipe, i = layer.layerskip
    run = layer.layerskip_forward or partial(type(layer).forward, layer)
    return recipe._run_layer(i, run, hidden_states, args, kwargs)


def _make_model_forward(kind: Any) -> Callable[..., Any]:
    """`forward` of a model that peft wraps, while a recipe is attached; with the signature of the class's own."""

    @wraps(kind.forward)
    def enter(model: Any, *args: Any, **kwargs: Any) -> Any:
        recipe = model.layerskip
        args, kwargs = recipe._before_model(model, args, kwargs) or (args, kwargs)
        run = model.layerskip_forward or partial(type(model).forward, model)
        output = run(*args, **kwargs)
        changed = recipe._after_model(model, args, output)
        return output if changed is None else changed

    return enter
