"""Tensors of safetensors files, one or many, each read through a mapping of its own."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Never

from torch import Tensor

from layerskip.checkpoint.contents import Contents, share_of_types
from layerskip.checkpoint.json_file import read_json
from layerskip.checkpoint.loading.tensors import Part
from layerskip.errors import WeightsError, brief

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
CONVERT = "convert it with transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
FOREIGN = {
    (
        ".safetensors",
    ): f"only {WEIGHTS_FILE}, or the files that {INDEX_FILE} names, are read: rename it if it is the model",
    (".gguf",): "name that file, or a folder in which it is the only one",
    (".bin", ".pt", ".pth", ".ckpt"): f"pickled weights can run code when they are read; {CONVERT}",
    (".npz", ".msgpack", ".h5", ".onnx", ".tflite"): f"these are weights of another framework; {CONVERT}",
}
"""By the endings of files that hold weights in other forms: what to do with them."""


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

    def by_file(self) -> dict[Path, list[str]]:
        """Names of the tensors in each file, files in the order of their names."""
        names: dict[Path, list[str]] = {path: [] for path in sorted(set(self._file_of.values()))}
        for name, path in self._file_of.items():
            names[path].append(name)
        return names

    def get(self, name: str, part: Part | None = None) -> Tensor:
        """A tensor, or only some of its rows or columns, in a mapping of its own.

        Tensors that are read through one handle share a mapping of the whole file, and the pages of those that were
        copied long ago would stay resident until the last of them goes.
        """
        from safetensors import safe_open

        with safe_open(self._file_of[name], framework="pt") as file:
            if part is None:
                tensor: Tensor = file.get_tensor(name)
                return tensor
            stored = file.get_slice(name)
            part.check(name, tuple(stored.get_shape()))
            wanted = slice(part.start, part.stop)
            some: Tensor = stored[wanted] if part.dim == 0 else stored[:, wanted]
        return some

    def block_format(self, name: str) -> None:
        """None: this format has no blocks."""

    def blocks(self, name: str, part: Part | None = None) -> Never:
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
        outside = sorted(file for file in weight_map.values() if not _lies_inside(file))
        if outside:
            raise WeightsError(
                f"{index} names the file {outside[0]!r}, which isn't in its folder; an index may name files beside it "
                "only: download the checkpoint again, from a source that you trust"
            )
        missing = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
        if missing:
            raise WeightsError(f"{len(missing)} weight files named by {index} are missing, first {missing[0]!r}")
        return {name: folder / file for name, file in weight_map.items()}
    raise WeightsError(f"{folder} has no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}{instead(folder)}")


def _lies_inside(name: str) -> bool:
    """Whether an index's entry names a file in the index's folder or below it.

    The names count, not where links lead: an index comes from elsewhere, and links are made on this machine (the hub's
    cache consists of them).
    """
    return not (
        PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or "\\" in name or ".." in Path(name).parts
    )


def instead(folder: Path) -> str:
    """What a folder has in place of what was looked for, and what to do with it; for the end of an error."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if any(name.startswith("adapter_") for name in names):
        return (
            "; it holds an adapter only (adapter_config.json): load its base model with peft, merge_and_unload(), and "
            "save the result with save_pretrained"
        )
    for suffixes, advice in FOREIGN.items():
        foreign = [name for name in names if name.endswith(suffixes)]
        if foreign:
            return f"; there is {foreign[0]!r}: {advice}"
    return ""


def _tensor_names(path: Path) -> frozenset[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return frozenset(file.keys())
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} can't be read as safetensors ({brief(error)}); it is truncated or not in that format: download it "
            "again"
        ) from error
