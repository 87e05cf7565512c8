"""One product of several weights in formats of their own.

Files mix formats within a layer: llama.cpp's Q4_K_M has Q6_K values beside Q4_K queries and keys. Each part keeps its
own panels, and the kernels go from one to the next.

Shapes: O output width of a part.
"""

import ctypes
from collections.abc import Sequence

from layerskip.model.native.library import COMPUTE, FORMATS, PANEL, LinearView, load_library
from layerskip.model.native.linear import NativeLinear


class JoinedLinear(NativeLinear):
    """Several weights with the same inputs as one `NativeLinear`."""

    def __init__(self, parts: Sequence[NativeLinear], *, alternate: bool = False) -> None:
        """Put weights together.

        Args:
            parts: What `can_join` allows, each with its own bias.
            alternate: Panels alternate between two parts of the same size, as those of gate and up do; otherwise the
                parts lie one below the other.
        """
        library = load_library()
        assert library is not None and can_join([part.outputs for part in parts], alternate=alternate)
        self._parts = tuple(parts)
        self._array = (LinearView * len(parts))(*(part.view for part in parts))
        self.outputs = sum(part.outputs for part in parts)
        self.storage = "+".join(part.storage for part in parts)
        self.view = LinearView(
            panels=ctypes.addressof(self._array),
            inputs=parts[0].view.inputs,
            outputs=sum(part.view.outputs for part in parts),
            format=FORMATS["alternating" if alternate else "stacked"],
            compute=max((part.view.compute for part in parts), default=COMPUTE["float32"]),
        )
        self._multiply = library.layerskip_multiply

    @property
    def num_bytes(self) -> int:
        """Bytes that a product reads."""
        return sum(part.num_bytes for part in self._parts)


def can_join(outputs: Sequence[int], *, alternate: bool) -> bool:
    """Whether weights of these output widths can be parts of one product.

    Args:
        outputs: O of each.
        alternate: As for `JoinedLinear`.
    """
    if alternate:
        return len(outputs) == 2 and outputs[0] == outputs[1]
    return all(count % PANEL == 0 for count in outputs[:-1])
