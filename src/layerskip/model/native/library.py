"""The compiled kernels (`native/`), their structures and functions as ctypes sees them.

The library is built when the package is installed, where a C++ compiler is at hand. Without it, or on a processor that
lacks what it was built for, `load_library` returns None, and everything runs in torch.
"""

import ctypes
import functools
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path

from layerskip.model.confidence import CONFIDENCE_CLASSES

INTERFACE = 4
"""Version of structures and functions; `layerskip_interface` must return it."""
LIBRARY = Path(__file__).parents[2] / "_native.so"
PANEL = 16
"""Outputs that lie side by side; widths are filled up to a multiple of it."""
GROUP = 32
"""Inputs that share a scale in int4 and in blocks."""
FORMATS = {
    "float32": 0, "bfloat16": 1, "int8": 2, "int4": 3, "float16": 4, "q8_0": 5, "q4_0": 6, "q4_1": 7,
}  # fmt: skip
ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1, "gelu": 2}


class LinearView(Structure):
    """`Linear` of native/linear.h."""

    _fields_ = (
        ("panels", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("inputs", c_int32),
        ("outputs", c_int32),
        ("format", c_int32),
        ("padding", c_int32),
    )


class LayerView(Structure):
    """`Layer` of native/network.h."""

    _fields_ = (
        ("qkv", LinearView),
        ("o", LinearView),
        ("gate_up", LinearView),
        ("down", LinearView),
        ("attention_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("post_attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("post_mlp_norm", c_void_p),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("window", c_int64),
    )


class NetworkView(Structure):
    """`Network` of native/network.h."""

    _fields_ = (
        ("layers", c_void_p),
        ("final_norm", c_void_p),
        ("head", LinearView),
        ("tokens", c_void_p),
        ("width", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_channels", c_int32),
        ("rotary_channels", c_int32),
        ("mlp_width", c_int32),
        ("vocabulary", c_int32),
        ("activation", c_int32),
        ("threads", c_int32),
        ("epsilon", c_float),
        ("attention_scale", c_float),
    )


class CacheView(Structure):
    """`Cache` of native/network.h."""

    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("layer_stride", c_int64),
        ("row_stride", c_int64),
        ("capacity", c_int64),
    )


class EmbeddingView(Structure):
    """`Embedding` of native/network.h."""

    _fields_ = (("table", c_void_p), ("format", c_int32), ("multiplier", c_float))


class DraftStopView(Structure):
    """`DraftStop` of native/network.h."""

    _fields_ = (("rates", c_float * CONFIDENCE_CLASSES), ("least", c_float))


class SamplingView(Structure):
    """`Sampling` of native/sampling.h."""

    _fields_ = (
        ("temperatures", POINTER(c_float)),
        ("top_p", POINTER(c_float)),
        ("min_p", POINTER(c_float)),
        ("top_k", POINTER(c_int32)),
        ("seeds", POINTER(c_uint64)),
    )


@functools.cache
def load_library(path: Path = LIBRARY) -> ctypes.CDLL | None:
    """The library with its functions declared, or None where it can't be used."""
    if not path.exists():
        return None
    try:
        library = ctypes.CDLL(str(path))
        library.layerskip_interface.restype = c_int32
        library.layerskip_runs_here.restype = c_int32
        if library.layerskip_interface() != INTERFACE or not library.layerskip_runs_here():
            return None
    except (OSError, AttributeError):  # another system's, or another version's
        return None
    library.layerskip_run_layers.argtypes = [
        POINTER(NetworkView), c_void_p, c_int32, c_int32, c_void_p, POINTER(CacheView), c_int32, c_int32,
    ]  # fmt: skip
    library.layerskip_unembed.argtypes = [POINTER(NetworkView), c_void_p, c_int32, c_void_p]
    library.layerskip_draft.argtypes = [
        POINTER(NetworkView), POINTER(EmbeddingView), c_void_p, c_int32, c_void_p, c_int32, c_int32,
        POINTER(CacheView), POINTER(DraftStopView), POINTER(SamplingView), c_int32, c_void_p, c_void_p, c_void_p,
    ]  # fmt: skip
    library.layerskip_draft.restype = c_int32
    library.layerskip_choose.argtypes = [
        POINTER(NetworkView), POINTER(EmbeddingView), c_void_p, c_void_p, c_int32, c_int32, c_void_p,
        POINTER(CacheView), c_int32, c_int32, POINTER(SamplingView), c_void_p,
    ]  # fmt: skip
    library.layerskip_filter.argtypes = [POINTER(SamplingView), c_void_p, c_int64, c_int64, c_int64, c_int32]
    library.layerskip_gumbel.argtypes = [c_void_p, c_int64, c_int64, c_void_p, c_int32]
    library.layerskip_packed_bytes.argtypes = [c_int32, c_int32, c_int32]
    library.layerskip_packed_bytes.restype = c_int64
    library.layerskip_pack.argtypes = [
        c_void_p, c_int32, c_int32, c_int32, c_void_p, c_void_p, c_int32, c_int32, c_int32,
    ]  # fmt: skip
    library.layerskip_pack_blocks.argtypes = library.layerskip_pack.argtypes
    for name in ("fits_bfloat16", "fits_float16"):
        getattr(library, f"layerskip_{name}").argtypes = [c_void_p, c_int64]
        getattr(library, f"layerskip_{name}").restype = c_int32
    library.layerskip_size_of.argtypes = [c_int32]
    library.layerskip_size_of.restype = c_int32
    library.layerskip_multiply.argtypes = [POINTER(LinearView), c_void_p, c_int32, c_void_p, c_int32]
    for name in ("run_layers", "unembed", "choose", "filter", "gumbel", "pack", "pack_blocks", "multiply"):
        getattr(library, f"layerskip_{name}").restype = None
    return library
