"""Nothing in a captured function waits for the device, has a shape that depends on numbers, or copies from the host."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import write_tiny_adapters
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from layerskip.language_model import LanguageModel
from layerskip.model.decoders.graphs import GraphDecoder
from layerskip.model.drafts import CONFIDENCE_CLASSES, DraftRequest, StopRule
from layerskip.model.draw import Draw
from layerskip.model.graphs.compiled import CompiledRounds
from layerskip.model.graphs.program import Program

REFUSED = {
    "_local_scalar_dense": "a number reaches the host",
    "item": "a number reaches the host",
    "equal": "a number reaches the host",
    "is_nonzero": "a number reaches the host",
    "nonzero": "the shape depends on numbers",
    "masked_select": "the shape depends on numbers",
    "unique_dim": "the shape depends on numbers",
    "_unique2": "the shape depends on numbers",
    "bincount": "the shape depends on numbers",
    "repeat_interleave": "the shape depends on numbers",
    "lift_fresh": "numbers of the host are copied to the device",
    "_pin_memory": "memory of the host is pinned",
}


METHODS = {"tolist", "numpy", "cpu", "cuda", "item", "__bool__", "__int__", "__float__", "__index__", "pin_memory"}
"""Of a tensor: on a CPU, some of them read its memory without any operator."""


class NoMethods(TorchFunctionMode):
    """Refuses methods that bring numbers to the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in METHODS:
            raise AssertionError(f"{name}: numbers reach the host")
        return func(*args, **(kwargs or {}))


class NoWaiting(TorchDispatchMode):
    """Refuses what a CUDA graph can't hold."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.operators.add(name)
        if name in REFUSED and not (name == "repeat_interleave" and "self_int" in func._overloadname):
            raise AssertionError(f"{name}: {REFUSED[name]}")
        if name in ("index", "index_put", "index_put_"):
            for index in args[1]:
                if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                    raise AssertionError(f"{name}: a mask is an index, so the shape depends on numbers")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: bool(x.any()),
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x.__setitem__(x > 0, 0.0),
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.repeat_interleave(torch.ones_like(x).long()),
        lambda x: x + torch.tensor([1.0]),
        lambda x: torch.where(x > 0)[0],
        lambda x: x.unique(),
    ],
)
def test_it_notices(call: Callable[[Tensor], Any]) -> None:
    x = torch.ones(3)
    with pytest.raises(AssertionError), NoMethods(), NoWaiting():
        call(x)


STOP = StopRule(rates=(0.9,) * CONFIDENCE_CLASSES, least=0.0)
FAMILIES: list[dict[str, Any]] = [
    {"model_type": "llama"},
    {"model_type": "mistral", "sliding_window": 7},
    {"model_type": "gemma3_text", "final_logit_softcapping": 2.0},
    {"model_type": "granite"},
    {"model_type": "olmo2"},
    {"model_type": "smollm3"},
]


def draw_of(num_rows: int, top_p: float) -> Draw:
    rows = range(num_rows)
    return Draw(
        temperatures=tuple(0.8 if row else 0.0 for row in rows),
        top_k=(0,) * num_rows,
        top_p=(top_p,) * num_rows,
        min_p=(0.02,) * num_rows,
        seeds=tuple(rows),
    )


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """By kind of function, the operators that ran; refused ones raise."""
    seen: dict[str, set[str]] = {}

    def call(program: Program) -> Tensor:
        with NoMethods(), NoWaiting() as watching:
            found = program.part(program.inputs.tensor)
        seen.setdefault(program.part.shape.kind, set()).update(watching.operators)
        return found

    monkeypatch.setattr(Program, "_call", call)
    return seen


def every_round(decoder: GraphDecoder, rounds: CompiledRounds) -> None:
    """Rounds of all kinds, of two rows, one of which is at the end of its cache."""
    cache = decoder.new_cache(2, 30)
    cache.commit(0, 3)
    cache.commit(1, cache.capacity - 2)
    depth, made = decoder.num_layers, len(rounds.report)
    for draw in (None, draw_of(2, 1.0), draw_of(2, 0.9)):
        for exit_layer in (1, 2):
            for stop in (None, STOP):
                request = DraftRequest(exit_layer=exit_layer, num_drafts=3, draw=draw, stop=stop)
                decoder.round([5, 6], cache, request, depth)
        step = DraftRequest(exit_layer=0, num_drafts=0, draw=draw)
        decoder.round([5, 6], cache, step, depth)
        decoder.round([5, 6], cache, step, 2)
        decoder.round([5, 6], cache, step, depth, [[1, 2], [3]])
    assert all(found.problem is None for found in rounds.report[made:])
    assert {found.shape.kind for found in rounds.report[made:]} == {"round", "draft", "last", "pass"}


@pytest.mark.parametrize("on_cpu", [True, False], ids=["operators of a CPU", "operators of CUDA"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family["model_type"])
def test_no_function_waits(
    tiny_checkpoint: Callable[..., Path],
    load_static: Callable[..., LanguageModel],
    monkeypatch: pytest.MonkeyPatch,
    watched: dict[str, set[str]],
    family: dict[str, Any],
    on_cpu: bool,
) -> None:
    decoder = load_static(tiny_checkpoint(**family)).decoder
    assert isinstance(decoder, GraphDecoder)
    monkeypatch.setattr(decoder._network, "_on_cpu", on_cpu)
    every_round(decoder, decoder._rounds)
    assert set(watched) == {"round", "draft", "last", "pass"}
    assert {"sort", "index_put_", "cumsum"} <= watched["round"]
    assert {"sort", "index_copy_"} <= watched["draft"]


@pytest.mark.parametrize("values", [True, False])
def test_no_adapter_waits(
    tiny_checkpoint: Callable[..., Path],
    load_static: Callable[..., LanguageModel],
    watched: dict[str, set[str]],
    tmp_path: Path,
    values: bool,
) -> None:
    """Those that read values of later layers, with a head of some tokens; also where early exit ends at one."""
    folder = tiny_checkpoint()
    adapters = write_tiny_adapters(tmp_path, folder, [1, 2], tokens=range(0, 96, 3), reads_values=values)
    decoder = load_static(folder, exit_adapters=adapters).decoder
    assert isinstance(decoder, GraphDecoder)
    every_round(decoder, decoder._rounds)
    assert set(watched) == {"round", "draft", "last", "pass"}
