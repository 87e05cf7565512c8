"""Exit adapters over a frozen model of transformers, and their loss.

The model runs once for all adapters, without gradients. An adapter is a projection of the state at its exit, a decoder
layer of the model's own kind and a norm; the model's own head, or its rows of some tokens, makes logits of it. Adapters
see exactly the states that they will see while drafting: those depend on the tokens alone, whoever drafted them.

Shapes: B samples, T tokens of a sample, n labelled tokens of a chunk, D width, V vocabulary, N tokens to draft,
M = S H_kv D_head values of S layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerskip.errors import InvalidArgumentError, UnsupportedModelError
from layerskip.model.positions import DISTANCES
from layerskip.training.config import ExitLossName
from layerskip.training.data.packing import IGNORED
from layerskip.training.exit_adapters.earlier_values import EarlierValues, read_earlier
from layerskip.training.exit_adapters.frozen import FrozenModel, Pass
from layerskip.training.exit_adapters.statistics import AdapterStatistics
from layerskip.training.recipe.anatomy import dissect, first
from layerskip.training.recipe.exit_loss import EXIT_LOSSES, GradientInForward, learned_tokens

CHUNK_LOGITS_CPU, CHUNK_LOGITS_GPU = 2**22, 2**27
"""Logits of an adapter that exist at the same time."""


class ExitAdapter(nn.Module):
    """One adapter."""

    def __init__(self, layer: nn.Module, norm: nn.Module, hidden_size: int, value_size: int) -> None:
        """Begin as a copy of a layer behind a projection that changes nothing.

        Args:
            layer: The model's last layer.
            norm: The model's final norm.
            hidden_size: D.
            value_size: M.
        """
        super().__init__()
        self.input_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.layer = deepcopy(layer).float()
        self.norm = deepcopy(norm).float()
        with torch.no_grad():
            self.input_proj.weight.copy_(torch.eye(hidden_size))
        self.value_proj = nn.Linear(value_size, hidden_size, bias=False) if value_size else None
        self.distances = nn.Parameter(torch.zeros(DISTANCES, hidden_size)) if value_size else None
        if self.value_proj is not None:
            nn.init.zeros_(self.value_proj.weight)
        for parameter in self.parameters():
            parameter.requires_grad_(True)

    def forward(
        self,
        hidden: Tensor,
        arguments: tuple[Any, ...],
        options: Mapping[str, Any],
        values: EarlierValues | None = None,
    ) -> Tensor:
        """[B, T, D], the state at the exit -> [B, T, D], what the head reads.

        Args:
            hidden: The output of layer E - 1.
            arguments: What the model gave its last layer besides the state, by position.
            options: The same by name.
            values: What an adapter that reads values reads.
        """
        with self._adding(values):
            normed: Tensor = self.norm(first(self.layer(self.input_proj(hidden), *arguments, **options)))
        return normed

    @contextmanager
    def _adding(self, values: EarlierValues | None) -> Iterator[None]:
        """Add the projected values to what attention adds to the state."""
        if self.value_proj is None or self.distances is None:
            yield
            return
        assert values is not None
        added = self.value_proj(values.values.to(self.value_proj.weight.dtype)) + self.distances[values.kinds]

        def add(module: nn.Module, args: Any, output: Any) -> Any:
            return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added

        handle = _last_of_attention(self.layer).register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()


def _last_of_attention(layer: nn.Module) -> nn.Module:
    """The part of a layer whose output attention adds to the state: a norm in families that have one there."""
    after = getattr(layer, "post_attention_layernorm", None)
    if after is not None and hasattr(layer, "post_feedforward_layernorm"):
        return after  # type: ignore[no-any-return]
    attention = getattr(layer, "self_attn", None)
    if attention is None:
        raise UnsupportedModelError(
            f"{type(layer).__name__} has no self_attn, after which an adapter could add values; train it with "
            "adapter_value_layers 0"
        )
    return attention  # type: ignore[no-any-return]


class AdaptedModel(nn.Module):
    """A frozen model and its adapters, which alone are parameters of this module."""

    def __init__(
        self,
        model: Any,
        exits: Sequence[int],
        *,
        loss: ExitLossName = "kl",
        tokens: Sequence[int] | None = None,
        value_layers: Sequence[int] = (),
    ) -> None:
        """Make the adapters.

        Args:
            model: A causal model of transformers, in the precision that it is to run in.
            exits: Number of layers before each adapter.
            loss: How adapters learn.
            tokens: [N] ids that they draft among, ascending; the whole vocabulary if not given.
            value_layers: Layers whose values they read.

        Raises:
            UnsupportedModelError: The model's layers, norm or head can't be reached.
            InvalidArgumentError: An exit that the model doesn't have.
        """
        super().__init__()
        anatomy = dissect(model)
        self.num_layers = len(anatomy.layers)
        for exit_layer in exits:
            if exit_layer >= self.num_layers:
                raise InvalidArgumentError(
                    f"exit_adapters names exit {exit_layer}, and the model has {self.num_layers} layers; "
                    f"give numbers from 1 to {self.num_layers - 1}"
                )
        self._frozen = (model.eval().requires_grad_(False),)  # in a tuple, or its weights would be this module's
        self._anatomy, self.exits = anatomy, tuple(sorted(exits))
        self.frozen = FrozenModel(anatomy, self.exits, value_layers)
        self._loss_name = loss
        self.value_layers = tuple(value_layers)
        width, size = self.frozen.hidden_size, self.frozen.values_size
        self.adapters = nn.ModuleDict(
            {f"exit_{e}": ExitAdapter(anatomy.layers[-1], anatomy.head.norm, width, size) for e in self.exits}
        )
        self.tokens = None if tokens is None else torch.tensor(list(tokens))
        self.statistics: AdapterStatistics | None = None

    @property
    def config(self) -> Any:
        """The frozen model's configuration."""
        return self._anatomy.model.config

    @property
    def head_rows(self) -> Tensor:
        """[N, D], the head's rows of the tokens that adapters draft."""
        linear: Any = self._anatomy.head.linear
        weight: Tensor = linear.weight
        return weight if self.tokens is None else weight[self.tokens.to(weight.device)]

    @property
    def head_cost(self) -> float:
        """Weights of the LM head divided by those of a layer."""
        linear: Any = self._anatomy.head.linear
        return float(linear.weight.numel() / sum(weight.numel() for weight in self._anatomy.layers[-1].parameters()))

    @property
    def draft_head_cost(self) -> float:
        """The same of the part of the head that adapters use."""
        linear: Any = self._anatomy.head.linear
        return self.head_cost * len(self.head_rows) / len(linear.weight)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> dict[str, Tensor]:
        """The mean loss of all adapters over the labelled tokens.

        Args:
            input_ids: [B, T].
            labels: [B, T], the tokens themselves, or IGNORED for those that aren't learned; the tokens if not given.
            position_ids: [B, T], from 0 in each example; counting up if not given.
            num_items_in_batch: Divisor of the sum over tokens; the labelled tokens if not given.
        """
        found = self.frozen.run(input_ids, position_ids)
        following = F.pad((input_ids if labels is None else labels)[:, 1:], (0, 1), value=IGNORED)
        places, wanted = learned_tokens(following.flatten())
        target = found.states[self.num_layers].flatten(0, 1)[places]
        values = self._earlier_values(found, position_ids)
        states = [self._adapt(exit_layer, found, values).flatten(0, 1)[places] for exit_layer in self.exits]
        if self.statistics is not None and not self.training:
            self.statistics.add(self, states, target, wanted, self._chunk_tokens(target))
        total: Tensor = GradientInForward.apply(  # type: ignore[no-untyped-call]
            lambda parts, where: self._losses(parts, target[where], wanted[where]),
            self._chunk_tokens(target),
            len(states),
            *states,
        )
        count = (wanted != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / (count * len(states))}

    def teacher(self, target: Tensor) -> Tensor:
        """Logits [n, V] of the frozen model, in float32, from its last layer's output [n, D]."""
        with torch.no_grad():
            return self._anatomy.head(target.to(self.head_dtype))

    @property
    def head_dtype(self) -> torch.dtype:
        """Type of the frozen model's weights."""
        linear: Any = self._anatomy.head.linear
        dtype: torch.dtype = linear.weight.dtype
        return dtype

    def logits(self, state: Tensor, rows: Tensor) -> Tensor:
        """Logits [n, N] of an adapter's output [n, D], in float32."""
        head = self._anatomy.head
        logits = F.linear(state.to(rows.dtype), rows).float()
        logits = logits if head.scale == 1.0 else logits * head.scale
        return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap

    def _losses(self, parts: Sequence[Tensor], target: Tensor, labels: Tensor) -> Iterator[tuple[int, Tensor, bool]]:
        """Sums over a chunk: (index of the adapter, loss, whether it trains the head, which it never does)."""
        rows, loss = self.head_rows, EXIT_LOSSES[self._loss_name]
        teacher = self._limited_teacher(target, rows)
        wanted = labels if self.tokens is None else self._among_tokens(labels)
        for i, part in enumerate(parts):
            yield i, loss(self.logits(part, rows), teacher, wanted).sum(), False

    def _limited_teacher(self, target: Tensor, rows: Tensor) -> Tensor:
        """Logits [n, N] of the frozen model for the tokens that adapters draft."""
        with torch.no_grad():
            return self.logits(self._anatomy.head.norm(target.to(self.head_dtype)), rows)

    def _among_tokens(self, labels: Tensor) -> Tensor:
        """Labels as places among the tokens that adapters draft. Others count too, but for cross-entropy."""
        assert self.tokens is not None
        tokens = self.tokens.to(labels.device)
        place = torch.searchsorted(tokens, labels).clamp(max=len(tokens) - 1)
        counts = tokens[place] == labels if self._loss_name == "ce" else labels != IGNORED
        return torch.where(counts, place, IGNORED)

    def _earlier_values(self, found: Pass, position_ids: Tensor | None) -> EarlierValues | None:
        values = found.all_values()
        return None if values is None else read_earlier(values, position_ids, spread=self.training)

    def _adapt(self, exit_layer: int, found: Pass, values: EarlierValues | None) -> Tensor:
        adapter = self.adapters[f"exit_{exit_layer}"]
        state = found.states[exit_layer].to(adapter.input_proj.weight.dtype)  # type: ignore[union-attr, arg-type]
        adapted: Tensor = adapter(state, found.arguments, found.options, values)
        return adapted

    def _chunk_tokens(self, target: Tensor) -> int:
        chunk = CHUNK_LOGITS_CPU if target.device.type == "cpu" else CHUNK_LOGITS_GPU
        return max(64, chunk // len(self.head_rows))
