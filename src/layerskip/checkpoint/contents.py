"""What a checkpoint's files hold: format, bytes, types of the tensors."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TypeShare:
    """Tensors of one type."""

    num_tensors: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The weights as they are on disk."""

    format: str
    """Such as `safetensors` or `GGUF version 3 (llama)`."""
    num_bytes: int
    """Bytes of all files with weights."""
    types: Mapping[str, TypeShare]
    """By the format's name of the type, most bytes first."""


def share_of_types(tensors: Iterable[tuple[str, int]]) -> dict[str, TypeShare]:
    """Types with their tensors and bytes, from (type, bytes) of each tensor."""
    shares: dict[str, TypeShare] = {}
    for name, num_bytes in tensors:
        before = shares.get(name, TypeShare(num_tensors=0, num_bytes=0))
        shares[name] = TypeShare(num_tensors=before.num_tensors + 1, num_bytes=before.num_bytes + num_bytes)
    return dict(sorted(shares.items(), key=lambda item: -item[1].num_bytes))
