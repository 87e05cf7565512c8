"""Greedy decoding through llama.cpp's C interface, for benchmarks: token by token, or verifying drafts."""

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import llama_cpp
import numpy as np
import numpy.typing as npt
from peers import common_length

__all__ = ["Drafts", "LlamaCpp", "ModelDrafts", "PhraseDrafts", "describe_build", "silence"]

SEQUENCE = 0
"""The only sequence of a context."""


class Drafts(Protocol):
    """Where drafts come from."""

    def start(self, prompt: Sequence[int]) -> None:
        """Forget the last text and read a prompt."""

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may follow."""


class LlamaCpp:
    """A GGUF file in llama.cpp."""

    def __init__(
        self,
        file: Path,
        context: int,
        threads: int,
        *,
        exact: bool = False,
        cache_type: int | None = None,
        attention: int | None = None,
    ) -> None:
        """Load the file.

        Args:
            file: The GGUF file.
            context: Tokens that there is room for.
            threads: Threads that compute.
            exact: Keep keys and values in float32, without fused attention: both round to float16 by default.
            cache_type: ggml's type of keys and values, if not `exact`; llama.cpp's default (float16) if not given.
            attention: One of LLAMA_FLASH_ATTN_TYPE_*, if not `exact`; llama.cpp decides if not given.
        """
        silence()
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp can't load {file}")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_threads, parameters.n_threads_batch = context, threads, threads
        parameters.n_batch = max(parameters.n_batch, context)
        if exact:
            cache_type, attention = llama_cpp.GGML_TYPE_F32, llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if cache_type is not None:
            parameters.type_k = parameters.type_v = cache_type
        if attention is not None:
            parameters.flash_attn_type = attention
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError(f"llama.cpp can't make a context of {context} tokens for {file}")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._tokenizer = llama_cpp.llama_model_get_vocab(self._model)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(self._tokenizer)
        self._batch = llama_cpp.llama_batch_init(context, 0, 1)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, special ones included."""
        content, room = text.encode(), len(text.encode()) + 8
        tokens = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self._tokenizer, content, len(content), tokens, room, True, True)
        return list(tokens[:count])

    def read(self, prompt: Sequence[int]) -> tuple[float, int]:
        """Seconds from a prompt to the token after it, and that token."""
        self.forget()
        start = time.perf_counter()
        token = self.next(prompt)
        return time.perf_counter() - start, token

    def write(self, prompt: Sequence[int], max_new_tokens: int) -> tuple[list[int], float]:
        """Generate, past the end of a text; returns the new tokens, and the seconds of all but the first."""
        self.forget()
        written = [self.next(prompt)]
        start = time.perf_counter()
        while len(written) < max_new_tokens:
            written.append(self.next(written[-1:]))
        return written, time.perf_counter() - start

    def write_with(
        self, drafts: Drafts, prompt: Sequence[int], max_new_tokens: int, num_drafts: int
    ) -> tuple[list[int], float, int]:
        """The same by verifying drafts, all tokens of a round in one call of `llama_decode`.

        Returns:
            The new tokens; the seconds of all but the first, drafts included; and the number of rounds.
        """
        self.forget()
        drafts.start(prompt)
        tokens = [*prompt, self.next(prompt)]
        end, rounds = len(prompt) + max_new_tokens, 0
        start = time.perf_counter()
        while len(tokens) < end:
            drafted = drafts.draft(tokens, min(num_drafts, end - len(tokens) - 1))
            chosen = self.choices([tokens[-1], *drafted], len(tokens) - 1)
            accepted = common_length(drafted, chosen)
            tokens += chosen[: accepted + 1]
            self.forget(len(tokens) - 1)
            rounds += 1
        return tokens[len(prompt) :], time.perf_counter() - start, rounds

    def next(self, tokens: Sequence[int]) -> int:
        """The likeliest token after some more tokens."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(array, len(tokens))) != 0:
            raise RuntimeError("llama_decode failed")
        return int(self._logits(-1).argmax())

    def choices(self, tokens: Sequence[int], position: int) -> list[int]:
        """The likeliest token after each of some tokens, the first of which is at a position."""
        self._decode(tokens, position)
        return [int(self._logits(i).argmax()) for i in range(len(tokens))]

    def logits(self, tokens: Sequence[int], chunk: int) -> npt.NDArray[np.float32]:
        """Logits after each token of a text [tokens, vocabulary], in calls of `chunk` tokens."""
        self.forget()
        found = []
        for begin in range(0, len(tokens), chunk):
            part = tokens[begin : begin + chunk]
            self._decode(part, begin)
            found += [self._logits(i).copy() for i in range(len(part))]
        return np.stack(found)

    def forget(self, position: int = 0) -> None:
        """Keep the tokens before a position only."""
        if not llama_cpp.llama_memory_seq_rm(self._memory, SEQUENCE, position, -1):
            raise RuntimeError(f"llama.cpp can't go back to token {position} with this model")

    def close(self) -> None:
        """Free the memory."""
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def _decode(self, tokens: Sequence[int], position: int) -> None:
        """Read tokens, and compute logits after each."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position + i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, SEQUENCE
        if llama_cpp.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")

    def _logits(self, index: int) -> npt.NDArray[np.float32]:
        logits = llama_cpp.llama_get_logits_ith(self._context, index)
        return np.ctypeslib.as_array(logits, (self._vocabulary,))


class ModelDrafts:
    """Drafts of a second model, as llama.cpp's `draft-simple` makes them: the likeliest token, one after another."""

    def __init__(self, model: LlamaCpp) -> None:
        self._model = model
        self._read: list[int] = []

    def start(self, prompt: Sequence[int]) -> None:
        """Read a prompt; the seconds of that aren't those of a round."""
        self._model.forget()
        self._model.next(prompt)
        self._read = list(prompt)

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """Read what is new, and write on; what was drafted in vain is forgotten."""
        if most <= 0:
            return []
        known = min(common_length(self._read, tokens), len(tokens) - 1)
        self._model.forget(known)
        drafted = [self._model.next(tokens[known:])]
        while len(drafted) < most:
            drafted.append(self._model.next(drafted[-1:]))
        self._read = [*tokens, *drafted[:-1]]
        return drafted


class PhraseDrafts:
    """Drafts from the text itself, by llama-cpp-python's own `LlamaPromptLookupDecoding`."""

    def __init__(self, num_drafts: int) -> None:
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        self._lookup = LlamaPromptLookupDecoding(num_pred_tokens=num_drafts)

    def start(self, prompt: Sequence[int]) -> None:
        """It keeps nothing."""

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """The tokens that followed the last two, or the last one, at their first occurrence."""
        found = self._lookup(np.array(tokens, dtype=np.intc))
        return [int(token) for token in found[: max(0, most)]]


def silence() -> None:
    """Drop llama.cpp's messages, which name every tensor that it loads or writes."""
    llama_cpp.llama_log_set(_ignore, ctypes.c_void_p(0))


def describe_build() -> dict[str, str]:
    """Versions of llama.cpp and of its package, and what it was compiled for."""
    return {
        "llama_cpp_python": llama_cpp.__version__,
        "llama_cpp": _call("llama", "llama_version"),
        "ggml": _call("ggml-base", "ggml_version"),
        "commit": _call("ggml-base", "ggml_commit"),
        "system": llama_cpp.llama_print_system_info().decode().strip(" |"),
    }


def _call(library: str, name: str) -> str:
    """The text that a function of one of its libraries returns; older versions don't have all of them."""
    files = sorted((Path(llama_cpp.__file__).parent / "lib").glob(f"*{library}.*"))
    function: Any = getattr(ctypes.CDLL(str(files[0])), name, None) if files else None
    if function is None:
        return "unknown"
    function.restype = ctypes.c_char_p
    return str(function().decode())


@llama_cpp.llama_log_callback
def _ignore(level: int, text: bytes, data: object) -> None:
    """A message that isn't shown."""
