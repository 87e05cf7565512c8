"""Random sizes for the C interface, with guard bytes around whatever it writes.

FUZZ_CASES=2000 python -m pytest tests/unit/model/native/test_fuzz.py
"""

import ctypes
import os
from ctypes import POINTER, addressof, c_float, c_int32, cast

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerskip.model.native.library import (
    COMPUTE,
    FORMATS,
    GROUP,
    PANEL,
    CacheView,
    ChooseCall,
    DraftCall,
    EmbeddingView,
    LayerView,
    LinearView,
    NetworkView,
    PackCall,
    RunLayersCall,
    SamplingView,
    find_variants,
)
from layerskip.model.native.variants import Variant

CASES = int(os.environ.get("FUZZ_CASES", "100"))
LIBRARIES = [variant for variant in find_variants() if variant.library is not None]
GUARD, FILL = 256, 0xA5
BLOCKS = {"q8_0": (34, 1), "q4_0": (18, 1), "q4_1": (20, 2)}
"""Bytes of a block, and float16 numbers at its start."""
SCALE_BYTES = {"int8": 4, "int4": 2, "q8_0": 2, "q4_0": 2, "q4_1": 4}
FUZZ = settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
pytestmark = [
    pytest.mark.skipif(not LIBRARIES, reason="the compiled kernels weren't built"),
    pytest.mark.parametrize(
        "variant", [LIBRARIES[0], LIBRARIES[-1]] if len(LIBRARIES) > 1 else LIBRARIES, ids=lambda v: v.target
    ),
]


class Guarded:
    """Buffers with guard bytes on both sides of each."""

    def __init__(self) -> None:
        self._kept: list[tuple[np.ndarray, int]] = []

    def bytes(self, count: int) -> np.ndarray:
        """[count] bytes, filled with a pattern."""
        whole = np.full(count + 2 * GUARD + 64, FILL, np.uint8)
        start = GUARD + (-(whole.ctypes.data + GUARD)) % 64
        whole = whole[start - GUARD : start + count + GUARD]
        self._kept.append((whole, count))
        return whole[GUARD : GUARD + count]

    def array(self, values: np.ndarray) -> np.ndarray:
        """A copy of an array."""
        own = self.bytes(values.nbytes).view(values.dtype).reshape(values.shape)
        own[...] = values
        return own

    def empty(self, count: int, dtype: type = np.float32) -> np.ndarray:
        """[count] numbers to be written."""
        return self.bytes(count * np.dtype(dtype).itemsize).view(dtype)

    def check(self) -> None:
        """Nothing was written beside a buffer."""
        for whole, count in self._kept:
            assert (whole[:GUARD] == FILL).all(), "written before a buffer"
            assert (whole[GUARD + count :] == FILL).all(), "written behind a buffer"


def pointer(array: np.ndarray) -> int:
    return int(array.ctypes.data)


def packed(
    library: ctypes.CDLL,
    own: Guarded,
    rng: np.random.Generator,
    name: str,
    inputs: int,
    outputs: int,
    threads: int,
    compute: str = "float32",
    step: int = 1,
) -> LinearView:
    """A weight of random numbers, or `step` of them whose panels alternate."""
    padded = -(-outputs // PANEL) * PANEL * step
    panels = own.bytes(library.layerskip_packed_bytes(inputs, padded, FORMATS[name]))
    groups = 1 if name == "int8" else inputs // GROUP
    scales = own.bytes(padded * groups * SCALE_BYTES.get(name, 0))
    for first in range(step):
        if name in BLOCKS:
            size, halves = BLOCKS[name]
            blocks = rng.integers(0, 256, (outputs, inputs // GROUP, size), np.uint8)
            blocks[..., : 2 * halves] = (
                rng.normal(0, 0.01, (outputs, inputs // GROUP, halves)).astype("<f2").view(np.uint8)
            )
            weight = own.array(blocks)
            pack = library.layerskip_pack_blocks
        else:
            weight = own.array((rng.normal(0, 0.1, (outputs, inputs))).astype(np.float16).astype(np.float32))
            pack = library.layerskip_pack
        pack(
            PackCall(
                pointer(weight), pointer(panels), pointer(scales), inputs, outputs, FORMATS[name], first, step, threads
            )
        )
    bias = own.array(rng.normal(0, 1, padded).astype(np.float32))
    return LinearView(
        panels=pointer(panels),
        scales=pointer(scales),
        bias=pointer(bias),
        inputs=inputs,
        outputs=padded,
        format=FORMATS[name],
        compute=COMPUTE[compute],
    )


formats = st.sampled_from(
    [*FORMATS.keys() & {"float32", "bfloat16", "float16", "int8", "int4", "q8_0", "q4_0", "q4_1"}]
)


@FUZZ
@given(
    data=st.data(),
    name=formats,
    outputs=st.integers(1, 90),
    rows=st.integers(0, 20),
    threads=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_products(
    variant: Variant, data: st.DataObject, name: str, outputs: int, rows: int, threads: int, seed: int
) -> None:
    """Any number of inputs where a format has no groups; results are those of single rows."""
    library, own, rng = variant.library, Guarded(), np.random.default_rng(seed)
    grouped = name in SCALE_BYTES and name != "int8"
    inputs = data.draw(st.integers(1, 5)) * GROUP if grouped else data.draw(st.integers(1, 130))
    small = name in SCALE_BYTES and inputs % GROUP == 0
    compute = data.draw(st.sampled_from(["float32", "int8"] if small else ["float32"]))
    weight = packed(library, own, rng, name, inputs, outputs, threads, compute)
    x = own.array(rng.normal(0, 1, (rows, inputs)).astype(np.float32))
    y, alone = own.empty(rows * weight.outputs), own.empty(rows * weight.outputs)
    library.layerskip_multiply(weight, pointer(x), rows, pointer(y), threads)
    for row in range(rows):
        library.layerskip_multiply(weight, pointer(x[row:]), 1, pointer(alone[row * weight.outputs :]), threads)
    own.check()
    assert np.array_equal(y.view(np.uint32), alone.view(np.uint32))
    assert np.isfinite(y).all()


@st.composite
def shapes(draw: st.DrawFn) -> dict:
    """Sizes of a network and what is run through it."""
    rows = draw(st.integers(1, 4))
    capacity = draw(st.integers(1, 90))
    starts = [draw(st.integers(0, capacity - 1)) for _ in range(rows)]
    kv_heads = draw(st.integers(1, 3))
    return {
        "width": PANEL * draw(st.integers(2, 4))
        if (name := draw(formats)) not in SCALE_BYTES
        else 32 * draw(st.integers(1, 2)),
        "format": name,
        "channels": 16 * draw(st.integers(1, 2)),
        "kv_heads": kv_heads,
        "heads": kv_heads * draw(st.integers(1, 3)),
        "inner": 32 * draw(st.integers(1, 3)),
        "vocabulary": PANEL * draw(st.integers(1, 8)) - draw(st.integers(0, PANEL - 1)),
        "layers": draw(st.integers(1, 2)),
        "window": draw(st.sampled_from([0, 0, 1, 5, 40])),
        "rows": rows,
        "capacity": capacity,
        "starts": starts,
        "counts": [draw(st.integers(0, min(70, capacity - start))) for start in starts],
        "threads": draw(st.integers(1, 4)),
        "compute": draw(st.sampled_from(["float32", "int8"])) if name in SCALE_BYTES else "float32",
        "seed": draw(st.integers(0, 2**31)),
    }


class Model:
    """A random network of these sizes, with a cache, all between guards."""

    def __init__(self, library: ctypes.CDLL, own: Guarded, rng: np.random.Generator, shape: dict) -> None:
        width, channels = shape["width"], shape["channels"]
        heads, kv_heads, threads = shape["heads"], shape["kv_heads"], shape["threads"]

        def linear(inputs: int, outputs: int, step: int = 1) -> LinearView:
            # Blocks need whole groups of inputs; what doesn't have them stays in bfloat16.
            name = shape["format"] if inputs % GROUP == 0 else "bfloat16"
            compute = shape["compute"] if name in SCALE_BYTES else "float32"
            return packed(library, own, rng, name, inputs, outputs, threads, compute, step)

        def floats(*size: int) -> np.ndarray:
            return own.array(rng.normal(0, 1, size).astype(np.float32))

        self.norm, self.head_norm = floats(width), floats(channels)
        self.cosines, self.sines = floats(shape["capacity"], channels), floats(shape["capacity"], channels)
        self.layers = (LayerView * shape["layers"])(
            *(
                LayerView(
                    qkv=linear(width, (heads + 2 * kv_heads) * channels),
                    o=linear(heads * channels, width),
                    gate_up=linear(width, shape["inner"], 2),
                    down=linear(shape["inner"], width),
                    attention_norm=pointer(self.norm),
                    mlp_norm=pointer(self.norm),
                    q_norm=pointer(self.head_norm),
                    k_norm=pointer(self.head_norm),
                    cosines=pointer(self.cosines),
                    sines=pointer(self.sines),
                    window=shape["window"],
                )
                for _ in range(shape["layers"])
            )
        )
        self.view = NetworkView(
            layers=addressof(self.layers),
            final_norm=pointer(self.norm),
            head=linear(width, shape["vocabulary"]),
            hidden_size=width,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=channels,
            rotary_dim=channels,
            intermediate_size=shape["inner"],
            vocab_size=shape["vocabulary"],
            activation=0,
            threads=threads,
            num_layers=shape["layers"],
            adapter=-1,
            rms_norm_eps=1e-5,
            attention_scale=channels**-0.5,
            residual_multiplier=1.0,
            all_heads=heads,
            all_kv_heads=kv_heads,
        )
        slots = shape["layers"] * shape["rows"] * (shape["capacity"] + 1)
        self.keys, self.values = floats(slots, kv_heads, channels), floats(slots, kv_heads, channels)
        stride = (shape["capacity"] + 1) * kv_heads * channels
        self.cache = CacheView(
            keys=pointer(self.keys),
            values=pointer(self.values),
            layer_stride=shape["rows"] * stride,
            row_stride=stride,
            capacity=shape["capacity"],
        )
        self.embedding = floats(shape["vocabulary"], width)
        self.table = EmbeddingView(table=pointer(self.embedding), format=FORMATS["float32"], multiplier=1.0)


@FUZZ
@given(shape=shapes())
def test_passes(variant: Variant, shape: dict) -> None:
    """Layers, then a token after each one: rows of any lengths, also none; only the slots of their tokens change."""
    library, own, rng = variant.library, Guarded(), np.random.default_rng(shape["seed"])
    model = Model(library, own, rng, shape)
    tokens = sum(shape["counts"])
    before = model.keys.copy()
    hidden = own.array(rng.normal(0, 1, (tokens, shape["width"])).astype(np.float32))
    starts, counts = own.array(np.array(shape["starts"], np.int64)), own.array(np.array(shape["counts"], np.int32))
    call = RunLayersCall(
        network=addressof(model.view),
        cache=addressof(model.cache),
        starts=pointer(starts),
        counts=pointer(counts),
        hidden=pointer(hidden),
        rows=shape["rows"],
        start=0,
        stop=shape["layers"],
    )
    library.layerskip_run_layers(call)
    own.check()
    assert np.isfinite(hidden).all()
    touched = np.any(model.keys != before, axis=(1, 2)).reshape(shape["layers"], shape["rows"], -1)
    for row, (start, count) in enumerate(zip(shape["starts"], shape["counts"], strict=True)):
        places = np.arange(shape["capacity"] + 1)
        outside = (places < start) | (places >= start + count)
        assert not touched[:, row, outside].any()

    token_ids = own.array(rng.integers(0, shape["vocabulary"], tokens))
    room, chosen = own.empty(tokens * shape["width"]), own.empty(tokens, np.int64)
    library.layerskip_choose(
        ChooseCall(
            network=addressof(model.view),
            cache=addressof(model.cache),
            embedding=addressof(model.table),
            tokens=pointer(token_ids),
            starts=pointer(starts),
            counts=pointer(counts),
            hidden=pointer(room),
            chosen=pointer(chosen),
            rows=shape["rows"],
            start=0,
            stop=shape["layers"],
        )
    )
    own.check()
    assert ((chosen >= 0) & (chosen < shape["vocabulary"])).all()


@FUZZ
@given(shape=shapes(), sampled=st.booleans(), data=st.data())
def test_drafts(variant: Variant, shape: dict, sampled: bool, data: st.DataObject) -> None:
    """Different limits in each row, up to the end of the cache, and none."""
    library, own, rng = variant.library, Guarded(), np.random.default_rng(shape["seed"])
    model, rows = Model(library, own, rng, shape), shape["rows"]
    # The last draft is run as well, in the slot behind its predecessor's.
    limits = [data.draw(st.integers(0, min(6, shape["capacity"] - start - 1))) for start in shape["starts"]]
    total = sum(limits)
    last, starts = own.array(rng.integers(0, shape["vocabulary"], rows)), own.array(np.array(shape["starts"], np.int64))
    most, written, drawn = own.array(np.array(limits, np.int32)), own.empty(rows, np.int32), own.empty(rows, np.int32)
    hidden, drafts = own.empty((total + rows) * shape["width"]), own.empty(total, np.int64)
    confidences = own.empty(total)
    temperatures, ones = own.array(np.full(rows, 0.8, np.float32)), own.array(np.full(rows, 0.9, np.float32))
    least, top = own.array(np.zeros(rows, np.float32)), own.array(rng.integers(0, 9, rows).astype(np.int32))
    seeds = own.array(rng.integers(0, 2**60, rows).astype(np.uint64))
    sampling = SamplingView(
        temperatures=cast(pointer(temperatures), POINTER(c_float)),
        top_p=cast(pointer(ones), POINTER(c_float)),
        min_p=cast(pointer(least), POINTER(c_float)),
        top_k=cast(pointer(top), POINTER(c_int32)),
        seeds=cast(pointer(seeds), POINTER(ctypes.c_uint64)),
    )
    problem = library.layerskip_draft(
        DraftCall(
            network=addressof(model.view),
            cache=addressof(model.cache),
            embedding=addressof(model.table),
            sampling=addressof(sampling) if sampled else None,
            tokens=pointer(last),
            starts=pointer(starts),
            limits=pointer(most),
            written=pointer(written),
            drawn=pointer(drawn),
            hidden=pointer(hidden),
            drafts=pointer(drafts),
            confidences=pointer(confidences),
            rows=rows,
            exit_layer=1,
            complete=1,
        )
    )
    own.check()
    assert problem == 0
    assert list(written) == limits
    assert ((drafts >= 0) & (drafts < shape["vocabulary"])).all()
