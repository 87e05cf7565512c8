"""States of the frozen model, kept on disk: from the second pass over the data on, the model needn't run again.

A folder holds `states.json` (what they are states of), `states.bin` (the states, block after block) and `keys.bin` (a
hash of each block's tokens and positions, written after its states).

Shapes: B samples, T tokens of a sample, C channels of a token.
"""

import json
import shutil
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerskip.errors import InvalidArgumentError
from layerskip.files import write_atomically

KEY_BYTES = 16


class StateCache:
    """What passes through the frozen model gave, by sample."""

    def __init__(
        self,
        folder: Path,
        *,
        num_blocks: int,
        length: int,
        channels: int,
        dtype: torch.dtype,
        states_of: Mapping[str, Any],
    ) -> None:
        """Open a folder, or begin one.

        Args:
            folder: Where the states are; states of something else there are deleted.
            num_blocks: Samples that there is room for.
            length: T.
            channels: C.
            dtype: Of the states.
            states_of: What identifies the model and the layers.

        Raises:
            InvalidArgumentError: The disk has too little room.
        """
        self._shape, self._dtype = (num_blocks, length, channels), dtype
        self._keys_file, states = folder / "keys.bin", folder / "states.bin"
        description = json.dumps({**states_of, "shape": self._shape, "dtype": str(dtype)}, sort_keys=True, default=str)
        file = folder / "states.json"
        if not (file.is_file() and file.read_text("utf-8") == description):
            for old in (file, self._keys_file, states):
                old.unlink(missing_ok=True)
            self._check_room(folder)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(file, description)
        self._states = torch.from_file(str(states), shared=True, size=torch.Size(self._shape).numel(), dtype=dtype)
        self._states = self._states.view(self._shape)
        keys = self._keys_file.read_bytes() if self._keys_file.is_file() else b""
        whole = len(keys) // KEY_BYTES * KEY_BYTES
        if whole < len(keys):  # cut off while it was written
            self._keys_file.write_bytes(keys[:whole])
        self._places = {keys[at : at + KEY_BYTES]: at // KEY_BYTES for at in range(0, whole, KEY_BYTES)}

    @property
    def num_bytes(self) -> int:
        """Bytes on the disk once all samples are there."""
        return torch.Size(self._shape).numel() * self._dtype.itemsize

    def __len__(self) -> int:
        return len(self._places)

    def get(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor | None:
        """States [B, T, C] of a batch, or None unless all of its samples are there.

        Args:
            input_ids: [B, T].
            position_ids: [B, T], or None.
        """
        places = [self._places.get(key) for key in _keys(input_ids, position_ids)]
        if any(place is None for place in places):
            return None
        return torch.stack([self._states[place] for place in places if place is not None])

    def put(self, input_ids: Tensor, position_ids: Tensor | None, states: Tensor) -> None:
        """Keep the states [B, T, C] of a batch; those that there is no room for are left out."""
        for key, state in zip(_keys(input_ids, position_ids), states, strict=True):
            place = self._places.get(key, len(self._places))
            if place >= len(self._states) or state.shape != self._states.shape[1:]:
                continue
            self._states[place] = state.to(self._dtype)
            if key not in self._places:
                self._places[key] = place
                with self._keys_file.open("ab") as file:
                    file.write(key)

    def _check_room(self, folder: Path) -> None:
        parent = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
        free = shutil.disk_usage(parent).free
        if self.num_bytes > free:
            raise InvalidArgumentError(
                f"cache_states needs {self.num_bytes / 1e9:.1f} GB in {folder}, and {free / 1e9:.1f} GB are free; "
                "leave it out, or train on less data"
            )


def _keys(input_ids: Tensor, position_ids: Tensor | None) -> list[bytes]:
    """A hash of each sample."""
    parts = [input_ids.cpu()] if position_ids is None else [input_ids.cpu(), position_ids.cpu()]
    return [
        blake2b(torch.stack(rows).numpy().tobytes(), digest_size=KEY_BYTES).digest()
        for rows in zip(*parts, strict=True)
    ]
