"""Tensors of safetensors files, one or many, each read through a mapping of its own."""

from collections.abc import Iterator
from pathlib import Path
from typing import Never

from torch import Tensor

from layerskip.checkpoint.contents import Contents, share_of_types
from layerskip.checkpoint.json_file import read_json
from layerskip.errors import WeightsError

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


class SafetensorsFiles:
    """Tensors by name from one or more safetensors files, memory-mapped (`model.weights.TensorSource`)."""

    def __init__(self, files: dict[str, Path | None]) -> None:
        """Read the files' headers.

        Args:
            files: File of each tensor; or one entry `"": file` whose tensors are all taken.

        Raises:
            WeightsError: A file is missing, truncated or not safetensors, or lacks a tensor that the index names.
        """
        self._file_of: dict[str, Path] = {}
        paths = {path for path in files.values() if path is not None}
        present = {path: _tensor_names(path) for path in sorted(paths)}
        if "" in files:
            self._file_of = {name: path for path in paths for name in present[path]}
            return
        for name, path in files.items():
            if path is None or name not in present[path]:
                raise WeightsError(f"the index names tensor {name!r} in {path}, which doesn't have it")
            self._file_of[name] = path

    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._file_of)

    def get(self, name: str) -> Tensor:
        """One tensor, in a mapping of its own.

        Tensors that are read through one handle share a mapping of the whole file, and the pages of those that were
        copied long ago would stay resident until the last of them goes.
        """
        from safetensors import safe_open

        with safe_open(self._file_of[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def block_format(self, name: str) -> None:
        """None: this format has no blocks."""

    def blocks(self, name: str) -> Never:
        """Nothing has blocks."""
        raise AssertionError(name)

    def contents(self) -> Contents:
        """Bytes of the files, and of the tensors by type."""
        paths = sorted(set(self._file_of.values()))
        return Contents(
            format="safetensors",
            num_bytes=sum(path.stat().st_size for path in paths),
            types=share_of_types(pair for path in paths for pair in self._types(path)),
        )

    def _types(self, path: Path) -> Iterator[tuple[str, int]]:
        """Type and bytes of each tensor of a file."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a handle isn't a dict
                tensor = file.get_tensor(name)
                yield str(tensor.dtype).removeprefix("torch."), tensor.nbytes


def find_weight_files(folder: Path) -> dict[str, Path | None]:
    """Which safetensors file holds which tensor (`""` for all, where there is one file).

    Raises:
        WeightsError: No safetensors, only pickles, a broken index, or a shard that is missing.
    """
    if (folder / WEIGHTS_FILE).is_file():  # where there are both, transformers takes this one too
        return {"": folder / WEIGHTS_FILE}
    index = folder / INDEX_FILE
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise WeightsError(f"{index} has no 'weight_map' of tensors to files; download the checkpoint again")
        missing = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
        if missing:
            raise WeightsError(f"{len(missing)} weight files named by {index} are missing, first {missing[0]!r}")
        return {name: folder / file for name, file in weight_map.items()}
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise WeightsError(
            f"{folder} has only pickled weights ({pickles[0]}), which can run code when they are read; convert them "
            "with transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    raise WeightsError(f"{folder} has no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}")


def _tensor_names(path: Path) -> frozenset[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return frozenset(file.keys())
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} can't be read as safetensors ({error}); it is truncated or not in that format: download it again"
        ) from error
