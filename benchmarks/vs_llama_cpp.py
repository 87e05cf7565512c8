"""Speed against llama.cpp on the same weights: greedy, batch 1, CPU, everything interleaved in one process.

    pip install llama-cpp-python gguf
    python benchmarks/vs_llama_cpp.py --model demo
    python benchmarks/vs_llama_cpp.py --model 240m --num-speculations 4
    python benchmarks/vs_llama_cpp.py --model smollm2 --exit-layer 2 --num-speculations 2 --compute int8

llama.cpp runs a GGUF file as it is; another checkpoint (a Llama) is written as a float32 GGUF file first. It gets
tokens one by one through its C interface. Tokens of the prompt are not counted. With the same weights, both engines
generate the same text, up to near-ties.
"""

import ctypes
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import llama_cpp
import numpy as np
import torch
import tyro
from arguments import DraftingArguments
from gguf import GGUFWriter
from models import gguf_file, load_prompts, prepare
from record import environment, write_record
from rich.console import Console
from rich.table import Table

import layerskip
from layerskip.checkpoint.loading.tensors import EMBEDDING, FINAL_NORM, HEAD, TensorSource
from layerskip.checkpoint.transformers_model import load_transformers_model
from layerskip.model.config.model_config import ModelConfig

LLAMA, OURS, SPECULATIVE, ADAPTIVE = "llama.cpp", "autoregressive", "self-speculative", "adaptive"
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True, kw_only=True)
class Arguments(DraftingArguments):
    """Options of the benchmark."""

    bfloat16_weights: bool = False
    """Round our weights to bfloat16, which the native kernels keep. Without this option both engines have the same
    numbers: a GGUF file as it is; other models, which must be Llamas, in float32."""
    compute: Literal["float32", "int8"] = "float32"
    """Whether our products take their inputs in 8 bits, as llama.cpp's do with quantized files."""


class LlamaCpp:
    """Greedy decoding through llama.cpp's C interface."""

    def __init__(self, file: Path, context: int, threads: int) -> None:
        llama_cpp.llama_log_set(_silence, ctypes.c_void_p(0))
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_threads, parameters.n_threads_batch = context, threads, threads
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def write(self, prompt: list[int], max_new_tokens: int) -> tuple[list[int], float]:
        """Generate; returns the new tokens, and the seconds of all but the first."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        written = [self._next(prompt)]
        start = time.perf_counter()
        while len(written) < max_new_tokens:
            written.append(self._next(written[-1:]))
        return written, time.perf_counter() - start

    def _next(self, tokens: list[int]) -> int:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(array, len(tokens))) != 0:
            raise RuntimeError("llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())


@llama_cpp.llama_log_callback
def _silence(level: int, text: bytes, data: object) -> None:
    """Drop llama.cpp's messages, which name every tensor that it loads."""


def main(arguments: Arguments) -> None:
    """Measure, print and record."""
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        model = prepare(arguments.model, Path(scratch), exit_layer=arguments.exit_layer, agreement=arguments.agreement)
        lm = layerskip.load(model, dtype="float32", device="cpu", compute=arguments.compute)
        file = gguf_file(model) or write_gguf(lm.config, lm.checkpoint.weights, Path(scratch) / "model.gguf")
        prompts = load_prompts(lm, arguments.prompts, arguments.num_prompts)
        context = max(map(len, prompts)) + arguments.max_new_tokens + 8
        theirs = LlamaCpp(file, context, arguments.threads)
        if arguments.bfloat16_weights:
            lm = in_bfloat16(lm, Path(scratch) / "bfloat16")
        measure(arguments, lm, theirs, prompts)


def in_bfloat16(lm: layerskip.LanguageModel, folder: Path) -> layerskip.LanguageModel:
    """The model with its weights rounded to bfloat16, as most checkpoints are published."""
    load_transformers_model(lm.checkpoint, torch.bfloat16).save_pretrained(folder)
    return layerskip.load(str(folder), dtype="float32", device="cpu")


def measure(arguments: Arguments, lm: layerskip.LanguageModel, theirs: LlamaCpp, prompts: list[list[int]]) -> None:
    """Run everything in turn and report."""
    options = {
        OURS: {"generation_strategy": "autoregressive"},
        SPECULATIVE: {
            "generation_strategy": "self_speculative",
            "exit_layer": arguments.exit_layer,
            "num_speculations": arguments.num_speculations,
        },
        ADAPTIVE: {"generation_strategy": "adaptive"},
    }
    speeds: dict[str, list[float]] = {LLAMA: [], **{name: [] for name in options}}
    same = dict.fromkeys(speeds, 0)
    for repetition in range(arguments.repetitions + 1):
        tokens, seconds = dict.fromkeys(speeds, 0), dict.fromkeys(speeds, 0.0)
        for prompt in prompts:
            expected, spent = theirs.write(prompt, arguments.max_new_tokens)
            tokens[LLAMA] += len(expected) - 1
            seconds[LLAMA] += spent
            same[LLAMA] += repetition == 0
            for name, strategy in options.items():
                result = lm.generate(
                    [prompt], max_new_tokens=arguments.max_new_tokens, do_sample=False, ignore_eos=True, **strategy
                )[0]
                tokens[name] += result.stats.tokens - 1
                seconds[name] += result.stats.seconds - result.stats.time_to_first_token_s
                same[name] += repetition == 0 and result.token_ids == expected
        if repetition:  # the first warms up
            for name, values in speeds.items():
                values.append(tokens[name] / seconds[name])
    report(arguments, speeds, same, len(prompts))


def report(arguments: Arguments, speeds: dict[str, list[float]], same: dict[str, int], num_prompts: int) -> None:
    """Print a table and write the record."""
    table = Table(title=f"{arguments.model}: exit {arguments.exit_layer}, {arguments.num_speculations} drafts")
    for column in ("decoder", "tokens/s (median)", "min - max", "over llama.cpp", "same texts"):
        table.add_column(column)
    ratios = {}
    for name, values in speeds.items():
        ratios[name] = statistics.median(a / b for a, b in zip(values, speeds[LLAMA], strict=True))
        span = f"{min(values):.1f} - {max(values):.1f}"
        equal = f"{same[name]} of {num_prompts}"
        table.add_row(name, f"{statistics.median(values):.1f}", span, f"{ratios[name]:.2f}", equal)
    console = Console()
    console.print(table)
    content = {
        "arguments": json.loads(json.dumps(asdict(arguments), default=str)),
        "llama_cpp_python": llama_cpp.__version__,
        "tokens_per_second": speeds,
        "same_texts": same,
        "ratios": ratios,
    }
    path = write_record(f"vs_llama_cpp-{Path(arguments.model).name}", content)
    console.print(f"{environment()['cpu']}, {arguments.threads} threads; record: {path}")


def write_gguf(config: ModelConfig, source: TensorSource, file: Path) -> Path:
    """Write a Llama's weights in float32, without its tokenizer, and return the file."""
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(next(iter(config.ropes.values())).rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(0)
    writer.add_tensor("token_embd.weight", _float32(source.get(EMBEDDING)))
    writer.add_tensor("output_norm.weight", _float32(source.get(FINAL_NORM)))
    if not config.tie_word_embeddings:
        writer.add_tensor("output.weight", _float32(source.get(HEAD)))
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for layer in range(config.num_layers):
        for theirs, ours in NAMES.items():
            weight = _float32(source.get(f"model.layers.{layer}.{theirs}.weight"))
            if ours in heads:  # llama.cpp rotates neighbouring channels, transformers the halves of a head
                halves = weight.reshape(heads[ours], 2, -1, weight.shape[1])
                weight = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
            writer.add_tensor(f"blk.{layer}.{ours}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _float32(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().numpy()


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
