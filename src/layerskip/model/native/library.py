"""The compiled kernels (`native/`), their structures and functions as ctypes sees them.

They are built when the package is installed, where a C++ compiler is at hand, one library for each instruction set
(`variants.py`). Without any, or on a processor that lacks the instructions of all, `load_library` returns None, and
everything runs in torch.
"""

import ctypes
import functools
import warnings
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from layerskip.model.drafts import CONFIDENCE_CLASSES
from layerskip.model.native.variants import (
    TARGET_VARIABLE,
    TARGETS,
    Expected,
    Variant,
    open_variant,
    outdated_text,
    pick,
    process_choice,
)

INTERFACE = 16
"""Version of what the functions do; `layerskip_interface` must return it."""
LIBRARIES = tuple(Path(__file__).parents[2] / f"_native_{target}.so" for target in TARGETS)
"""Files to try, the fastest instruction set first."""
PANEL = 16
"""Number of outputs that lie side by side; weights are filled up to a multiple of it."""
GROUP = 32
"""Number of inputs that share a scale in int4 and in blocks."""
FORMATS = {
    "float32": 0, "bfloat16": 1, "int8": 2, "int4": 3, "float16": 4, "q8_0": 5, "q4_0": 6, "q4_1": 7,
    "q5_0": 8, "q5_1": 9, "q4_k": 10, "q5_k": 11, "q6_k": 12, "stacked": 13, "alternating": 14,
}  # fmt: skip
"""Formats of weights; the last two are of several weights in formats of their own (`joined.py`)."""
COMPUTE = {"float32": 0, "int8": 1, "bfloat16": 2}
ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1, "gelu": 2}


class LinearView(Structure):
    """`Linear` of native/kernels/linear.h."""

    _fields_ = (
        ("panels", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("inputs", c_int32),
        ("outputs", c_int32),
        ("format", c_int32),
        ("compute", c_int32),
    )


class ExpertView(Structure):
    """`Expert` of native/network.h."""

    _fields_ = (("gate_up", LinearView), ("down", LinearView))


class LayerView(Structure):
    """`Layer` of native/network.h."""

    _fields_ = (
        ("input", LinearView),
        ("values", LinearView),
        ("value_layers", c_void_p),
        ("distances", c_void_p),
        ("qkv", LinearView),
        ("o", LinearView),
        ("gate_up", LinearView),
        ("down", LinearView),
        ("router", LinearView),
        ("experts", c_void_p),
        ("attention_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("post_attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("post_mlp_norm", c_void_p),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("window", c_int64),
        ("num_value_layers", c_int64),
    )


class NetworkView(Structure):
    """`Network` of native/network.h."""

    _fields_ = (
        ("layers", c_void_p),
        ("final_norm", c_void_p),
        ("head", LinearView),
        ("token_ids", c_void_p),
        ("exits", c_void_p),
        ("hidden_size", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("rotary_dim", c_int32),
        ("intermediate_size", c_int32),
        ("num_experts", c_int32),
        ("experts_per_token", c_int32),
        ("expert_size", c_int32),
        ("norm_expert_weights", c_int32),
        ("vocab_size", c_int32),
        ("activation", c_int32),
        ("threads", c_int32),
        ("num_layers", c_int32),
        ("num_adapters", c_int32),
        ("adapter", c_int32),
        ("rms_norm_eps", c_float),
        ("attention_scale", c_float),
        ("residual_multiplier", c_float),
        ("joint_qk_norm", c_int32),
        ("all_heads", c_int32),
        ("all_kv_heads", c_int32),
        ("counted", c_void_p),
        ("total", c_void_p),
    )


class CacheView(Structure):
    """`Cache` of native/network.h."""

    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
        ("layer_stride", c_int64),
        ("row_stride", c_int64),
        ("capacity", c_int64),
        ("format", c_int32),
        ("padding", c_int32),
    )


class EmbeddingView(Structure):
    """`Embedding` of native/network.h."""

    _fields_ = (("table", c_void_p), ("format", c_int32), ("multiplier", c_float))


class StopRuleView(Structure):
    """`StopRule` of native/network.h."""

    _fields_ = (("rates", c_float * CONFIDENCE_CLASSES), ("least", c_float), ("kept", c_float))


class SamplingView(Structure):
    """`Sampling` of native/kernels/sampling.h."""

    _fields_ = (
        ("temperatures", POINTER(c_float)),
        ("top_p", POINTER(c_float)),
        ("min_p", POINTER(c_float)),
        ("top_k", POINTER(c_int32)),
        ("seeds", POINTER(c_uint64)),
    )


class RunLayersCall(Structure):
    """`RunLayersCall` of native/interface.h."""

    _fields_ = (
        ("network", c_void_p),
        ("cache", c_void_p),
        ("starts", c_void_p),
        ("counts", c_void_p),
        ("hidden", c_void_p),
        ("rows", c_int32),
        ("start", c_int32),
        ("stop", c_int32),
        ("padding", c_int32),
    )


class AdaptCall(Structure):
    """`AdaptCall` of native/interface.h."""

    _fields_ = (
        ("network", c_void_p),
        ("cache", c_void_p),
        ("starts", c_void_p),
        ("counts", c_void_p),
        ("sources", c_void_p),
        ("hidden", c_void_p),
        ("rows", c_int32),
        ("layer", c_int32),
    )


class ChooseCall(Structure):
    """`ChooseCall` of native/interface.h."""

    _fields_ = (
        ("network", c_void_p),
        ("cache", c_void_p),
        ("embedding", c_void_p),
        ("sampling", c_void_p),
        ("tokens", c_void_p),
        ("starts", c_void_p),
        ("counts", c_void_p),
        ("hidden", c_void_p),
        ("chosen", c_void_p),
        ("rows", c_int32),
        ("start", c_int32),
        ("stop", c_int32),
        ("padding", c_int32),
    )


class DraftCall(Structure):
    """`DraftCall` of native/interface.h."""

    _fields_ = (
        ("network", c_void_p),
        ("cache", c_void_p),
        ("embedding", c_void_p),
        ("stop_rule", c_void_p),
        ("sampling", c_void_p),
        ("tokens", c_void_p),
        ("starts", c_void_p),
        ("limits", c_void_p),
        ("written", c_void_p),
        ("drawn", c_void_p),
        ("hidden", c_void_p),
        ("drafts", c_void_p),
        ("confidences", c_void_p),
        ("rows", c_int32),
        ("exit_layer", c_int32),
        ("complete", c_int32),
        ("padding", c_int32),
    )


class RoundsCall(Structure):
    """`RoundsCall` of native/interface.h."""

    _fields_ = (
        ("network", c_void_p),
        ("drafter", c_void_p),
        ("cache", c_void_p),
        ("embedding", c_void_p),
        ("draft_embedding", c_void_p),
        ("stop_rule", c_void_p),
        ("sampling", c_void_p),
        ("tokens", c_void_p),
        ("starts", c_void_p),
        ("remaining", c_void_p),
        ("limits", c_void_p),
        ("ends", c_void_p),
        ("num_ends", c_void_p),
        ("texts", c_void_p),
        ("written", c_void_p),
        ("drawn", c_void_p),
        ("drafts", c_void_p),
        ("targets", c_void_p),
        ("confidences", c_void_p),
        ("seconds", c_void_p),
        ("most_seconds", c_double),
        ("rows", c_int32),
        ("exit_layer", c_int32),
        ("num_layers", c_int32),
        ("complete", c_int32),
        ("most_rounds", c_int32),
        ("repeated", c_int32),
    )


class PackCall(Structure):
    """`PackCall` of native/interface.h."""

    _fields_ = (
        ("weight", c_void_p),
        ("panels", c_void_p),
        ("scales", c_void_p),
        ("inputs", c_int32),
        ("outputs", c_int32),
        ("format", c_int32),
        ("first", c_int32),
        ("step", c_int32),
        ("threads", c_int32),
    )


STRUCTURES: tuple[type[Structure], ...] = (
    LinearView,
    ExpertView,
    LayerView,
    NetworkView,
    CacheView,
    EmbeddingView,
    StopRuleView,
    SamplingView,
    RunLayersCall,
    AdaptCall,
    ChooseCall,
    DraftCall,
    RoundsCall,
    PackCall,
)
"""All of them, in the order of native/layout.cpp."""
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "run_layers": (None, [POINTER(RunLayersCall)]),
    "write_keys": (None, [POINTER(RunLayersCall)]),
    "run_adapter": (None, [POINTER(AdaptCall)]),
    "unembed": (None, [POINTER(NetworkView), c_void_p, c_int32, c_void_p]),
    "choose": (None, [POINTER(ChooseCall)]),
    "draft": (c_int32, [POINTER(DraftCall)]),
    "rounds": (c_int32, [POINTER(RoundsCall)]),
    "packed_bytes": (c_int64, [c_int32, c_int32, c_int32]),
    "pack": (None, [POINTER(PackCall)]),
    "pack_blocks": (None, [POINTER(PackCall)]),
    "fits_float16": (c_int32, [c_void_p, c_int64]),
    "fits_bfloat16": (c_int32, [c_void_p, c_int64]),
    "multiply": (None, [POINTER(LinearView), c_void_p, c_int32, c_void_p, c_int32]),
    "filter": (None, [POINTER(SamplingView), c_void_p, c_int64, c_int64, c_int64, c_int32]),
    "gumbel": (None, [c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int32]),
    "interface": (c_int32, []),
    "target": (c_char_p, []),
    "runs_here": (c_int32, []),
    "missing": (c_char_p, []),
    "layout": (c_char_p, []),
}
"""Result and parameters of each function of native/interface.h, whose name begins with `layerskip_`."""


@functools.cache
def load_library(paths: tuple[Path, ...] = LIBRARIES, target: str | None = None) -> ctypes.CDLL | None:
    """The library that this process uses, with its functions declared, or None if there is none.

    Warns once if a file was built for another version.

    Args:
        paths: Files to try, the best first.
        target: Instruction set to insist on, such as `avx512` or `avx2`; what `insist_on` or the environment's
            `LAYERSKIP_CPU` names if not given.

    Raises:
        InvalidArgumentError: No library is for this instruction set, or it can't run here.
    """
    variants = find_variants(paths)
    warning = outdated_text(variants)
    if warning is not None:
        warnings.warn(warning, RuntimeWarning, stacklevel=2)
    wanted, asked_by = process_choice().wanted() if target is None else (target, TARGET_VARIABLE)
    found = pick(variants, wanted, asked_by)
    return None if found is None else found.library


def find_variants(paths: Sequence[Path] = LIBRARIES) -> list[Variant]:
    """The libraries, the best first, and for each whether it can be used here."""
    expected = Expected(interface=INTERFACE, functions=FUNCTIONS, layout=layout)
    return [open_variant(path, expected) for path in paths]


def insist_on(target: str) -> None:
    """Use the library for an instruction set, in this process from now on.

    Raises:
        InvalidArgumentError: It can't run here, or the process already uses another.
    """
    choice = process_choice()
    choice.check(target)
    pick(find_variants(), target, f"kernels 'native:{target}'")
    if choice.forced != target:
        choice.forced = target
        load_library.cache_clear()


def settle_library() -> ctypes.CDLL:
    """The library for a network: from now on, this process can't be asked to use another."""
    library = load_library()
    assert library is not None, "why_not_native says whether there is one"
    process_choice().settled = target_of(library)
    return library


def target_of(library: ctypes.CDLL) -> str:
    """The instruction set that a library was compiled for."""
    return str(library.layerskip_target().decode())


def kernels_version() -> str | None:
    """What the speed of the compiled kernels depends on, None if there are none."""
    library = load_library()
    return None if library is None else f"{target_of(library)}, interface {INTERFACE}"


def layout() -> str:
    """Size of every structure, and offset and size of each of its fields, as `layerskip_layout` describes them."""
    text = ""
    for structure in STRUCTURES:
        fields = [(field[0], getattr(structure, field[0])) for field in structure._fields_]
        places = " ".join(f"{name} {field.offset}+{field.size}" for name, field in fields)
        text += f"{structure.__name__.removesuffix('View')} {ctypes.sizeof(structure)}: {places}\n"
    return text


def address(structure: Structure | ctypes.Array[Any] | None) -> int | None:
    """Where a structure or an array lies, for a field of a call; None stays a null pointer.

    The caller keeps it alive until the call has returned.
    """
    return None if structure is None else ctypes.addressof(structure)
