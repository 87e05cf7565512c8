"""A GGUF file's keys about its model, read with checks of their types."""

import math
from typing import Any

import numpy as np

from layerskip.checkpoint.gguf.container import Container
from layerskip.errors import CheckpointError


class ModelKeys:
    """A container's keys, each with a check of its type."""

    def __init__(self, container: Container) -> None:
        self.container = container
        self.architecture = str(self._get("general.architecture", str, "a text"))

    def count(self, key: str, default: int | None = None) -> int:
        """Read a positive whole number of this architecture, such as `block_count`.

        Raises:
            CheckpointError: It is missing and there is no default, or isn't one.
        """
        name = f"{self.architecture}.{key}"
        value = self.container.metadata.get(name, default)
        if isinstance(value, np.ndarray) and len(value) and np.all(value == value[0]):  # a value per layer, all equal
            value = value[0].item()
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._wrong(name, "a positive whole number", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Read a positive number of this architecture, such as `rope.freq_base`.

        Raises:
            CheckpointError: It is missing and there is no default, or isn't one.
        """
        name = f"{self.architecture}.{key}"
        value = self.container.metadata.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self._wrong(name, "a positive number", value)
        single = np.float32(value)  # 1e-5 is stored as 9.99999974e-06: restore the original number
        return float(str(single)) if single == value else float(value)

    def text(self, key: str, default: str) -> str:
        """Read a text of this architecture, such as `rope.scaling.type`."""
        return str(self._get(f"{self.architecture}.{key}", str, "a text", default))

    def has(self, key: str) -> bool:
        """Whether the architecture has this key with a value other than 0 (which means absent in some files)."""
        value = self.container.metadata.get(f"{self.architecture}.{key}")
        return value is not None and not (isinstance(value, int | float) and value == 0)

    def token_id(self, key: str) -> int | None:
        """A token id of the tokenizer, such as `eos_token_id`; None if the file has none."""
        value = self._get(f"tokenizer.ggml.{key}", int, "a token id", -1)
        return None if value in (-1, 2**32 - 1) else int(value)

    def _get(self, name: str, kind: type, wanted: str, default: Any = None) -> Any:
        value = self.container.metadata.get(name, default)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self._wrong(name, wanted, value)
        return value

    def _wrong(self, name: str, wanted: str, value: Any) -> CheckpointError:
        given = "it is missing" if value is None else f"got {str(value)[:80]!r}"
        return CheckpointError(f"{self.container.path}: the key {name!r} must be {wanted}; {given}")
