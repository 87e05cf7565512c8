"""Writing a checkpoint with whole numbers in place of its matrices, as compressed-tensors lays them out.

The numbers are those that native kernels make of a weight when it is loaded with `quantize`, to the last bit.

Shapes: O output width, I input width, G = I / 32 groups.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor

from layerskip.checkpoint.checkpoint import Checkpoint
from layerskip.checkpoint.exit_adapters import DESCRIPTION_FILE, has_adapters, read_adapters
from layerskip.checkpoint.folder import TUNED_FILE
from layerskip.checkpoint.loading.adapters import describe_base
from layerskip.checkpoint.loading.quantization import native_storage
from layerskip.checkpoint.loading.tensors import EMBEDDING, HEAD, check_names, read_tensor, tensor_shapes
from layerskip.checkpoint.safetensors import FOREIGN, INDEX_FILE, WEIGHTS_FILE
from layerskip.errors import InvalidArgumentError, UnsupportedModelError
from layerskip.files import to_json
from layerskip.model.native.library import GROUP

QUANTIZATIONS = ("int8", "int4")
SHARD_BYTES = 2 * 10**9
"""Bytes of a file with weights, from which another one is begun."""
Report = Callable[[int, int], None]


def check_writable(checkpoint: Checkpoint, quantize: str | None, output: Path) -> None:
    """Check all that can be known before any work is done.

    Args:
        checkpoint: What to quantize.
        quantize: int8 or int4.
        output: Folder of the new checkpoint.

    Raises:
        InvalidArgumentError: The folder isn't empty or can't be written, or there are no such bits.
        UnsupportedModelError: The checkpoint is quantized already, or isn't a folder in Hugging Face's format.
    """
    if quantize not in QUANTIZATIONS:
        raise InvalidArgumentError(f"quantize must be {' or '.join(QUANTIZATIONS)} to be saved, got {quantize!r}")
    if checkpoint.hugging_face_folder is None:
        raise UnsupportedModelError(
            f"{checkpoint.name} is a GGUF file; only a checkpoint in Hugging Face's format can be quantized (GGUF "
            "files are made by llama.cpp's llama-quantize)"
        )
    if checkpoint.raw_config.get("quantization_config") is not None:
        raise UnsupportedModelError(
            f"{checkpoint.name} is quantized already ({checkpoint.contents.format}); quantize the original checkpoint"
        )
    if output.exists() and not output.is_dir():
        raise InvalidArgumentError(f"{output} is a file; name a folder that is empty or doesn't exist")
    if output.is_dir() and any(output.iterdir()):
        raise InvalidArgumentError(f"{output} isn't empty; name a folder that is empty or doesn't exist")
    above = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise InvalidArgumentError(f"{above} can't be written, and so {output} can't be made; name another folder")


def write_quantized(checkpoint: Checkpoint, quantize: str, output: Path, report: Report | None = None) -> None:
    """Write the checkpoint, under another name until it is complete.

    Args:
        checkpoint: One that passes `check_writable`.
        quantize: int8, or int4, which leaves weights in int8 whose inputs aren't whole groups of 32.
        output: The folder.
        report: Told of the weights written and of all.
    """
    check_writable(checkpoint, quantize, output)
    source = checkpoint.hugging_face_folder
    assert source is not None
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    try:
        partial.chmod(0o777 & ~_umask())
        _write_weights(checkpoint, quantize, partial, report or (lambda done, total: None))
        _write_config(checkpoint, quantize, partial)
        _copy_files(source, partial)
        if has_adapters(source):
            _adopt_adapters(checkpoint, source, partial)
        os.replace(partial, output)  # an empty folder is replaced
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def quantize_weight(weight: Tensor, storage: str) -> tuple[Tensor, Tensor]:
    """Numbers and scales of a weight, as native kernels make them (`pack` in native/kernels/packing.cpp).

    Args:
        weight: [O, I].
        storage: int8: a scale for each output; int4: for each 32 inputs, in bfloat16.

    Returns:
        [O, I] int8, and [O, 1] float32 or [O, G] bfloat16.
    """
    groups = weight.float().view(len(weight), -1, weight.shape[1] if storage == "int8" else GROUP)
    largest = groups.abs().amax(-1, keepdim=True)
    limit = 127 if storage == "int8" else 7
    kept = largest / limit if storage == "int8" else (largest / limit).to(torch.bfloat16)
    step = kept.float()
    numbers = torch.where(step > 0, groups / step, 0.0).round_().clamp_(-limit - 1, limit)
    return numbers.to(torch.int8).flatten(1), kept.squeeze(-1)


def pack_four_bits(numbers: Tensor) -> Tensor:
    """[O, I] from -8 to 7 -> int32 [O, I / 8], the first number in the lowest bits, 8 added to each."""
    shifted = (numbers + 8).view(torch.uint8)
    return (shifted[:, ::2] | shifted[:, 1::2] << 4).contiguous().view(torch.int32)


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is quantized: all matrices of layers and the head; not the embedding, of which rows are read."""
    return len(shape) == 2 and name != EMBEDDING


def _tensors(checkpoint: Checkpoint, quantize: str, report: Report) -> Iterator[dict[str, Tensor]]:
    """The tensors of each weight, one weight after the other."""
    config, source = checkpoint.network_config, checkpoint.weights
    check_names(config, source.names())
    shapes = tensor_shapes(config)
    shapes.setdefault(HEAD, shapes[EMBEDDING])  # a tied head is quantized, and so a tensor of its own
    for done, (name, shape) in enumerate(shapes.items()):
        tied = name == HEAD and config.tie_word_embeddings
        weight = read_tensor(source, EMBEDDING if tied else name, shape)
        if not _is_matrix(name, shape):
            yield {name: weight.contiguous()}
        else:
            module, storage = name.removesuffix(".weight"), native_storage(quantize, shape[1])
            assert storage is not None
            numbers, scales = quantize_weight(weight, storage)
            if storage == "int4":
                packed = {"weight_packed": pack_four_bits(numbers), "weight_shape": torch.tensor(shape)}
            else:
                packed = {"weight": numbers}
            yield {f"{module}.{key}": value for key, value in {**packed, "weight_scale": scales}.items()}
        report(done + 1, len(shapes))


def _write_weights(checkpoint: Checkpoint, quantize: str, folder: Path, report: Report) -> None:
    """All tensors, in as many files as it takes, and the index where there are several."""
    from safetensors.torch import save_file

    files: list[tuple[Path, list[str]]] = []
    pending: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        path = folder / f"{len(files)}.safetensors"
        save_file(pending, path, metadata={"format": "pt"})
        path.chmod(0o666 & ~_umask())  # the library lets nobody else read it
        files.append((path, list(pending)))
        pending.clear()

    for tensors in _tensors(checkpoint, quantize, report):
        size = sum(tensor.nbytes for tensor in tensors.values())
        if pending and size + sum(tensor.nbytes for tensor in pending.values()) > SHARD_BYTES:
            flush()
        pending.update(tensors)
        total += size
    flush()
    if len(files) == 1:
        files[0][0].rename(folder / WEIGHTS_FILE)
        return
    weight_map = {}
    for number, (path, names) in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        path.rename(folder / name)
        weight_map.update(dict.fromkeys(names, name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(to_json(index, indent=2) + "\n", encoding="utf-8")


def _write_config(checkpoint: Checkpoint, quantize: str, folder: Path) -> None:
    """config.json, which says how the weights are stored; its head is a tensor of its own."""
    raw = {**checkpoint.raw_config, "tie_word_embeddings": False}
    raw["quantization_config"] = describe_quantization(checkpoint, quantize)
    (folder / "config.json").write_text(to_json(raw, indent=2) + "\n", encoding="utf-8")


def describe_quantization(checkpoint: Checkpoint, quantize: str) -> dict[str, Any]:
    """The `quantization_config`, with the modules by name where they differ."""
    stored: dict[str, list[str]] = {"int8": [], "int4": []}
    shapes = tensor_shapes(checkpoint.network_config)
    for name, shape in {**shapes, HEAD: shapes[EMBEDDING]}.items():
        if _is_matrix(name, shape):
            stored[native_storage(quantize, shape[1]) or ""].append(name.removesuffix(".weight"))
    used = {storage: modules for storage, modules in stored.items() if modules}
    forms = {"int8": "int-quantized", "int4": "pack-quantized"}
    groups = {
        f"group_{index}": {
            "targets": ["Linear"] if len(used) == 1 else modules,
            "weights": _describe_weights(storage),
            "input_activations": None,
            "output_activations": None,
            "format": forms[storage],
        }
        for index, (storage, modules) in enumerate(used.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": forms[next(iter(used))] if len(used) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _describe_weights(storage: str) -> dict[str, Any]:
    grouped = storage == "int4"
    return {
        "num_bits": 4 if grouped else 8,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if grouped else "channel",
        "group_size": GROUP if grouped else None,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def _copy_files(source: Path, folder: Path) -> None:
    """Tokenizer, generation settings and whatever else lies with the model, but no other weights.

    Exit adapters are hard-linked where that is possible: they are large and never changed in place.
    """
    weights = tuple(suffix for suffixes in FOREIGN for suffix in suffixes)
    for path in sorted(source.iterdir()):
        if (
            not path.is_file()
            or (folder / path.name).exists()
            or path.name in (INDEX_FILE, TUNED_FILE, DESCRIPTION_FILE)
        ):
            continue
        if path.name == "exit_adapters.safetensors":
            _link(path, folder / path.name)
        elif not path.name.endswith(weights):
            shutil.copy(path, folder / path.name)


def _link(path: Path, to: Path) -> None:
    try:
        os.link(path.resolve(), to)
    except OSError:  # another file system, or one without links
        shutil.copy(path, to)


def _adopt_adapters(checkpoint: Checkpoint, source: Path, folder: Path) -> None:
    """Describe the exit adapters as those of the quantized model; what they draft, it verifies."""
    adapters, quantized = read_adapters(source), Checkpoint.in_folder(folder)
    base = describe_base(adapters.base.name, quantized.network_config, quantized.weights)
    description = replace(adapters, base=base).to_json()
    (folder / DESCRIPTION_FILE).write_text(to_json(description, indent=2) + "\n", encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
