"""What config.json's `quantization_config` says: which layout has a weight's numbers, in how many bits and groups.

Everything that isn't understood is refused by name: activations in fewer bits, rotated weights, formats of floats.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from layerskip.errors import UnsupportedModelError
from layerskip.model.config.values import shown

Kind = Literal["pack-quantized", "int-quantized", "gptq", "awq", "torchao"]
ORIGINAL = "take the original checkpoint in bfloat16 or float16 (and --quantize int8 or int4), or a GGUF file"
TORCHAO_TYPES = ("Int8WeightOnlyConfig", "IntxWeightOnlyConfig")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How some weights are stored."""

    kind: Kind
    bits: int
    """Bits of a number: 8 or 4."""
    group_size: int | None
    """Inputs that share a scale; None: all of them."""
    symmetric: bool
    """Whether there are no zero points, or only those in the middle."""
    reordered: bool = False
    """Whether inputs of one group aren't neighbours."""
    zero_offset: int = 0
    """Number that is added to stored zero points."""


@dataclass(frozen=True)
class Scheme:
    """Layouts by what they are for."""

    layouts: tuple[tuple[tuple[str, ...], Layout], ...]
    """Targets (a module's name, `re:` and a pattern of names, or a class), and their layout."""

    @property
    def name(self) -> str:
        """Kinds of layouts, for people."""
        return ", ".join(dict.fromkeys(f"{layout.kind}, {layout.bits} bits" for _, layout in self.layouts))

    def of(self, module: str) -> Layout:
        """The layout of a module that has quantized weights: a name counts before a pattern, and that before a class.

        Raises:
            UnsupportedModelError: No target names it.
        """
        ways: tuple[Callable[[str], bool], ...] = (
            lambda target: target == module,
            lambda target: target.startswith("re:") and re.match(target.removeprefix("re:"), module) is not None,
            lambda target: target == "Linear",
        )
        for matches in ways:
            for targets, layout in self.layouts:
                if any(matches(target) for target in targets):
                    return layout
        raise UnsupportedModelError(
            f"config.json: quantization_config has no target for {module!r}, whose weights are quantized; {ORIGINAL}"
        )


def read_scheme(given: Any) -> Scheme:
    """Understand a `quantization_config`.

    Raises:
        UnsupportedModelError: Naming what can't be read, and what to do.
    """
    if not isinstance(given, Mapping):
        raise _refused("quantization_config", given)
    match given.get("quant_method"):
        case "compressed-tensors":
            return Scheme(tuple(_compressed(given)))
        case "gptq":
            return Scheme(((("Linear",), _gptq(given)),))
        case "awq":
            return Scheme(((("Linear",), _awq(given)),))
        case "torchao":
            return Scheme(((("Linear",), _torchao(given)),))
        case method:
            raise _refused("quant_method", method)


def _refused(key: str, value: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"config.json: this checkpoint is quantized with {key} {shown(value)}, which isn't read; {ORIGINAL}"
    )


def _compressed(given: Mapping[str, Any]) -> list[tuple[tuple[str, ...], Layout]]:
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        value = given.get(key)
        dense = isinstance(value, Mapping) and value.get("format") == "dense"
        if value and not dense:
            raise _refused(key, value)
    if given.get("quantization_status", "compressed") != "compressed":
        raise _refused("quantization_status", given["quantization_status"])
    groups = given.get("config_groups")
    if (
        not isinstance(groups, Mapping)
        or not groups
        or not all(isinstance(group, Mapping) for group in groups.values())
    ):
        raise _refused("config_groups", groups)
    return [_compressed_group(group, group.get("format") or given.get("format")) for group in groups.values()]


def _compressed_group(group: Mapping[str, Any], form: Any) -> tuple[tuple[str, ...], Layout]:
    if form not in ("pack-quantized", "int-quantized"):
        raise _refused("format", form)
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            raise _refused(key, group[key])
    weights, targets = group.get("weights"), group.get("targets")
    if not isinstance(weights, Mapping) or not isinstance(targets, list):
        raise _refused("config_groups", group)
    if weights.get("type", "int") != "int":
        raise _refused("type", weights["type"])
    strategy = weights.get("strategy")
    if strategy not in ("channel", "group") or weights.get("dynamic"):
        raise _refused("strategy", strategy)
    layout = Layout(
        kind=form,
        bits=_bits(weights, "num_bits"),
        group_size=_group_size(weights) if strategy == "group" else None,
        symmetric=bool(weights.get("symmetric", True)),
        reordered=weights.get("actorder") == "group",
    )
    return tuple(map(str, targets)), layout


def _gptq(given: Mapping[str, Any]) -> Layout:
    form = given.get("checkpoint_format") or "gptq"
    if form not in ("gptq", "gptq_v2"):
        raise _refused("checkpoint_format", form)
    if given.get("dynamic"):
        raise _refused("dynamic", given["dynamic"])
    return Layout(
        kind="gptq",
        bits=_bits(given, "bits"),
        group_size=_group_size(given),
        symmetric=bool(given.get("sym", True)),
        reordered=bool(given.get("desc_act")),
        zero_offset=1 if form == "gptq" else 0,
    )


def _awq(given: Mapping[str, Any]) -> Layout:
    version = str(given.get("version", "gemm")).lower()
    if version != "gemm":
        raise _refused("version", version)
    bits = _bits(given, "bits")
    if bits != 4:
        raise _refused("bits", bits)
    return Layout(kind="awq", bits=4, group_size=_group_size(given), symmetric=False)


def _torchao(given: Mapping[str, Any]) -> Layout:
    type_ = given.get("quant_type")
    default = type_.get("default") if isinstance(type_, Mapping) and set(type_) == {"default"} else None
    if not isinstance(default, Mapping) or default.get("_type") not in TORCHAO_TYPES:
        raise _refused("quant_type", default.get("_type") if isinstance(default, Mapping) else type_)
    if default["_type"] == "Int8WeightOnlyConfig":
        return Layout(kind="torchao", bits=8, group_size=None, symmetric=True)
    width, mapping = (_torchao_name(default, key) for key in ("weight_dtype", "mapping_type"))
    if re.fullmatch("int[1-8]", width) is None:
        raise _refused("weight_dtype", width)
    bits = 4 if int(width[3:]) <= 4 else 8
    return Layout(kind="torchao", bits=bits, group_size=None, symmetric=mapping == "SYMMETRIC")


def _torchao_name(given: Mapping[str, Any], key: str) -> str:
    """Name of a type or a value that torchao has written as an object."""
    data = given.get("_data")
    value = data.get(key) if isinstance(data, Mapping) else None
    return str(value.get("_data")) if isinstance(value, Mapping) else str(value)


def _bits(given: Mapping[str, Any], key: str) -> int:
    bits = given.get(key)
    if bits not in (4, 8):
        raise _refused(key, bits)
    return int(bits)


def _group_size(given: Mapping[str, Any]) -> int | None:
    """Inputs that share a scale; -1 stands for all."""
    size = given.get("group_size")
    if isinstance(size, bool) or not isinstance(size, int) or (size != -1 and size < 1):
        raise _refused("group_size", size)
    return None if size == -1 else size
