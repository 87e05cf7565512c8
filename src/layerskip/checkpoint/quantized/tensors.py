"""Tensors of a quantized checkpoint under the names that they have in one of floats (a `TensorSource`).

Shapes: O output width, I input width, G groups of inputs.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from layerskip.checkpoint.contents import Contents
from layerskip.checkpoint.loading.tensors import Part, StoredTensor
from layerskip.checkpoint.quantized.numbers import Quantized, block_format, unpack, unpack_awq
from layerskip.checkpoint.quantized.scheme import Kind, Layout, Scheme
from layerskip.checkpoint.safetensors import SafetensorsFiles
from layerskip.errors import WeightsError
from layerskip.model.blocks import BLOCK, BlockFormat, BlockWeight

Role = Literal["numbers", "scales", "zeros", "groups"]
NAMES: dict[Kind, dict[Role, str]] = {
    "pack-quantized": {
        "numbers": "weight_packed",
        "scales": "weight_scale",
        "zeros": "weight_zero_point",
        "groups": "weight_g_idx",
    },
    "int-quantized": {
        "numbers": "weight",
        "scales": "weight_scale",
        "zeros": "weight_zero_point",
        "groups": "weight_g_idx",
    },
    "gptq": {"numbers": "qweight", "scales": "scales", "zeros": "qzeros", "groups": "g_idx"},
    "awq": {"numbers": "qweight", "scales": "scales", "zeros": "qzeros", "groups": "g_idx"},
    "torchao": {
        "numbers": "_weight_qdata",
        "scales": "_weight_scale",
        "zeros": "_weight_zero_point",
        "groups": "_weight_g_idx",
    },
}
"""Names of a module's tensors, by what they hold."""
BOOKKEEPING = ("weight_shape",)
"""Tensors that say what is known anyway."""
ALIGNMENT = 8
"""Outputs that share a word in some layouts."""


@dataclass(frozen=True, kw_only=True)
class _Module:
    """A module whose weight is quantized."""

    name: str
    layout: Layout

    def tensor(self, role: Role) -> str:
        """Name of one of its tensors."""
        return f"{self.name}.{NAMES[self.layout.kind][role]}"


class QuantizedTensors:
    """Tensors by the names that they have in a checkpoint of floats."""

    def __init__(self, source: SafetensorsFiles, scheme: Scheme) -> None:
        """Find the quantized modules.

        Args:
            source: The files' own tensors.
            scheme: What config.json says of them.

        Raises:
            UnsupportedModelError: config.json doesn't say how a module is quantized.
            WeightsError: A module lacks its scales.
        """
        self._source, self._scheme = source, scheme
        self._modules: dict[str, _Module] = {}
        names = source.names()
        kinds = dict.fromkeys(layout.kind for _, layout in scheme.layouts)
        parts: set[str] = set()
        for name in sorted(names):
            module, _, last = name.rpartition(".")
            if last not in {NAMES[kind]["numbers"] for kind in kinds} or source.stored(name).dtype.is_floating_point:
                continue
            quantized = _Module(name=module, layout=scheme.of(module))
            if quantized.tensor("scales") not in names or quantized.tensor("numbers") != name:
                raise WeightsError(
                    f"tensor {name!r} has no {quantized.tensor('scales')!r} beside it; the files are incomplete, or "
                    "config.json describes another layout"
                )
            self._modules[f"{module}.weight"] = quantized
            parts.update(f"{module}.{last}" for last in (*NAMES[quantized.layout.kind].values(), *BOOKKEEPING))
        self._names = frozenset(names - parts | self._modules.keys())

    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return self._names

    def stored(self, name: str) -> StoredTensor:
        """What the headers say of a tensor."""
        module = self._modules.get(name)
        if module is None:
            return self._source.stored(name)
        numbers, scales = (self._source.stored(module.tensor(role)) for role in ("numbers", "scales"))
        return StoredTensor(
            shape=self._shape(module),
            dtype=torch.float32,
            num_bytes=numbers.num_bytes + scales.num_bytes,
            mapped=False,
        )

    def get(self, name: str, part: Part | None = None) -> Tensor:
        """A tensor, or only some of its rows or columns; a quantized one as float32."""
        module = self._modules.get(name)
        return self._source.get(name, part) if module is None else self._read(name, module, part).dequantize()

    def block_format(self, name: str) -> BlockFormat | None:
        """Format of blocks with exactly the tensor's numbers; None if there is none."""
        module = self._modules.get(name)
        if module is None or module.layout.reordered:
            return None
        layout, scales = module.layout, self._source.stored(module.tensor("scales"))
        across = layout.kind in ("gptq", "awq")
        return block_format(
            bits=layout.bits,
            symmetric=layout.symmetric or not self._has(module, "zeros"),
            inputs=self._shape(module)[1],
            num_groups=scales.shape[0] if across else scales.shape[1],
            scale_dtype=scales.dtype,
        )

    def blocks(self, name: str, part: Part | None = None) -> BlockWeight:
        """A tensor that has a `block_format`, or some of its rows or columns, in these blocks."""
        format_ = self.block_format(name)
        assert format_ is not None, name
        if part is not None and part.dim == 1 and format_ != "int8" and (part.start % BLOCK or part.stop % BLOCK):
            raise WeightsError(
                f"tensor {name!r} is in blocks of {BLOCK} columns, and columns {part.start} to {part.stop - 1} would "
                f"cut them; take a multiple of {BLOCK}, or the tensor's numbers without blocks"
            )
        return self._read(name, self._modules[name], part).in_blocks(format_)

    def contents(self) -> Contents:
        """Bytes of the files, and of the tensors by type."""
        contents = self._source.contents()
        return replace(contents, format=f"{contents.format} ({self._scheme.name})")

    def _has(self, module: _Module, role: Role) -> bool:
        return module.tensor(role) in self._source.names()

    def _shape(self, module: _Module) -> tuple[int, int]:
        """(O, I)."""
        rows, columns = self._source.stored(module.tensor("numbers")).shape
        packed = 32 // module.layout.bits
        match module.layout.kind:
            case "pack-quantized":
                return rows, columns * packed
            case "gptq":
                return columns, rows * packed
            case "awq":
                return columns * packed, rows
            case _:
                return rows, columns

    def _read(self, name: str, module: _Module, part: Part | None) -> Quantized:
        """Numbers and scales of a weight, or of some rows (read in whole words) or columns (of which all are read)."""
        outputs, inputs = self._shape(module)
        if part is not None:
            part.check(name, (outputs, inputs))
        start, stop = (part.start, part.stop) if part is not None and part.dim == 0 else (0, outputs)
        first = start - start % ALIGNMENT
        last = min(-(-stop // ALIGNMENT) * ALIGNMENT, outputs)
        numbers, zeros, scales = self._region(module, first, last)
        if scales.shape[1] < 1 or inputs % scales.shape[1]:
            raise WeightsError(f"tensor {name!r} of {inputs} inputs has {scales.shape[1]} scales for each output")
        groups = self._groups(name, module, inputs, scales.shape[1])
        whole = Quantized(_subtract(name, module.layout, numbers, zeros, groups), scales, groups)
        rows = slice(start - first, stop - first)
        chosen = Quantized(whole.numbers[rows], whole.scales[rows], groups)
        return chosen.columns(part.start, part.stop) if part is not None and part.dim == 1 else chosen

    def _region(self, module: _Module, first: int, last: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """Outputs first..last-1: numbers [O, I] (from 0 on where they are packed), zero points and scales [O, G]."""
        layout, bits = module.layout, module.layout.bits

        def read(role: Role, part: Part) -> Tensor:
            return self._source.get(module.tensor(role), part)

        rows, columns = Part.rows(first, last), Part.columns(first, last)
        has_zeros, packed = self._has(module, "zeros"), 32 // bits
        words = (first // packed, -(-last // packed))
        match layout.kind:
            case "pack-quantized":
                zeros = unpack(read("zeros", Part.rows(*words)), bits, 0)[: last - first] if has_zeros else None
                return unpack(read("numbers", rows), bits, 1), zeros, read("scales", rows)
            case "gptq":
                zeros = unpack(read("zeros", Part.columns(*words)), bits, 1).t() + layout.zero_offset
                return unpack(read("numbers", columns), bits, 0).t(), zeros, read("scales", columns).t()
            case "awq":
                zeros = unpack_awq(read("zeros", Part.columns(*words))).t()
                return unpack_awq(read("numbers", Part.columns(*words))).t(), zeros, read("scales", columns).t()
            case _:
                zeros = read("zeros", rows) if has_zeros else None
                return read("numbers", rows), zeros, read("scales", rows)

    def _groups(self, name: str, module: _Module, inputs: int, num_groups: int) -> Tensor | None:
        """The group of each input, where those of a group aren't neighbours.

        Raises:
            WeightsError: They aren't, and config.json says that they are; or there is no such group.
        """
        if not self._has(module, "groups"):
            return None
        groups = self._source.get(module.tensor("groups")).long()
        if groups.shape != (inputs,) or int(groups.min()) < 0 or int(groups.max()) >= num_groups:
            raise WeightsError(f"tensor {name!r}: its groups must be {inputs} numbers from 0 to {num_groups - 1}")
        if torch.equal(groups, torch.arange(inputs) // (inputs // num_groups)):
            return None
        if not module.layout.reordered:
            raise WeightsError(
                f"tensor {name!r} has groups of inputs that aren't neighbours, and config.json doesn't say so "
                "(desc_act, actorder); correct it there"
            )
        return groups


def _subtract(name: str, layout: Layout, numbers: Tensor, zeros: Tensor | None, groups: Tensor | None) -> Tensor:
    """Numbers [O, I] without their zero points [O, G]."""
    middle = 0 if layout.kind == "torchao" else 1 << layout.bits - 1
    if numbers.dtype == torch.int8 and zeros is None:
        return numbers
    if zeros is not None and layout.symmetric and layout.kind in ("gptq", "torchao") and bool((zeros != middle).any()):
        raise WeightsError(
            f"tensor {name!r} has zero points other than {middle}, and config.json says that it has none; "
            "correct it there"
        )
    if layout.symmetric and layout.kind == "torchao":
        return numbers
    wide = numbers.to(torch.int16 if layout.bits == 8 else torch.int8)
    if zeros is None:
        return (wide - middle).to(torch.int8)
    each = zeros.to(wide.dtype)
    if each.shape[1] == 1:
        return wide - each
    if groups is not None:
        return wide - each[:, groups]
    return (wide.view(len(wide), each.shape[1], -1) - each.unsqueeze(-1)).flatten(1)
