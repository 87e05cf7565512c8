"""One model as GGUF files in the formats that users of llama.cpp pick, quantized by llama.cpp itself."""

import ctypes
import os
from pathlib import Path
from typing import Literal, get_args

from layerskip.checkpoint.checkpoint import open_checkpoint
from layerskip.export.gguf.write import export_gguf

__all__ = ["FORMATS", "Format", "write_format"]

Format = Literal["file", "f32", "bf16", "q8_0", "q4_0", "q4_1", "q4_k_m", "q5_k_m", "q6_k"]
"""`file` is the model's own GGUF file."""
FORMATS: tuple[Format, ...] = get_args(Format)
FILE_TYPES = {
    "bf16": "LLAMA_FTYPE_MOSTLY_BF16",
    "q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0",
    "q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0",
    "q4_1": "LLAMA_FTYPE_MOSTLY_Q4_1",
    "q4_k_m": "LLAMA_FTYPE_MOSTLY_Q4_K_M",
    "q5_k_m": "LLAMA_FTYPE_MOSTLY_Q5_K_M",
    "q6_k": "LLAMA_FTYPE_MOSTLY_Q6_K",
}
"""Names of llama.cpp's mixtures: each says which types the tensors get."""


def write_format(model: str, name: str, folder: Path, threads: int, exit_layer: int | None = None) -> Path:
    """The file of a format; what is in the folder already isn't written again.

    The weights are exported as float32, and llama.cpp's `llama_model_quantize` makes the other formats of them.

    Args:
        model: A name for `layerskip.load`.
        name: One of `FORMATS`, but not `file`.
        folder: Where files of this model lie.
        threads: Threads that quantize.
        exit_layer: E layers, for a model that drafts; all if not given.
    """
    stem = "model" if exit_layer is None else f"draft{exit_layer}"
    target = folder / f"{stem}-{name}.gguf"
    if target.exists():
        return target
    floats = folder / f"{stem}-f32.gguf"
    if not floats.exists():
        folder.mkdir(parents=True, exist_ok=True)
        export_gguf(open_checkpoint(model), floats, exit_layer=exit_layer, type_name="f32")
    if name != "f32":
        quantize(floats, target, name, threads)
    return target


def quantize(source: Path, target: Path, name: str, threads: int) -> None:
    """Write a file in another format; it is complete or absent."""
    try:
        import llama_cpp
        from llama_cpp_model import silence
    except ImportError as error:
        raise SystemExit(f"writing {name} needs llama.cpp ({error}): pip install llama-cpp-python") from error

    silence()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = getattr(llama_cpp, FILE_TYPES[name]), threads
    partial = target.with_suffix(".partial")
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(parameters))
    if code != 0:
        partial.unlink(missing_ok=True)
        raise RuntimeError(f"llama.cpp can't write {source} as {name} (code {code})")
    os.replace(partial, target)
