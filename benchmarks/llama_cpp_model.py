"""Greedy decoding through llama.cpp's C interface, for benchmarks."""

import ctypes
import time
from pathlib import Path

import llama_cpp
import numpy as np


class LlamaCpp:
    """A GGUF file in llama.cpp."""

    def __init__(self, file: Path, context: int, threads: int, *, exact: bool = False) -> None:
        """Load the file.

        Args:
            file: The GGUF file.
            context: Tokens that there is room for.
            threads: Threads that compute.
            exact: Keep keys and values in float32, without fused attention: both round to float16 by default.
        """
        llama_cpp.llama_log_set(_silence, ctypes.c_void_p(0))
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp can't load {file}")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_threads, parameters.n_threads_batch = context, threads, threads
        if exact:
            parameters.type_k = parameters.type_v = llama_cpp.GGML_TYPE_F32
            parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        self._tokenizer = llama_cpp.llama_model_get_vocab(self._model)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, special ones included."""
        content, room = text.encode(), len(text.encode()) + 8
        tokens = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self._tokenizer, content, len(content), tokens, room, True, True)
        return list(tokens[:count])

    def write(self, prompt: list[int], max_new_tokens: int) -> tuple[list[int], float]:
        """Generate, past the end of a text; returns the new tokens, and the seconds of all but the first."""
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

    def close(self) -> None:
        """Free the memory."""
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)


@llama_cpp.llama_log_callback
def _silence(level: int, text: bytes, data: object) -> None:
    """Drop llama.cpp's messages, which name every tensor that it loads."""
