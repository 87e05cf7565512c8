"""transformers' own `generate`, with and without its early-exit assistant, on the same checkpoint: for reference."""

import time
from typing import Any

import torch

from layerskip.checkpoint.transformers_model import load_transformers_model
from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.request import choose_exit_layer
from layerskip.evaluation.benchmark.runner import Decoded
from layerskip.language_model import LanguageModel


class TransformersRunner:
    """Decodes by transformers."""

    def __init__(self, lm: LanguageModel, config: GenerationConfig, *, early_exit: bool) -> None:
        """Load the checkpoint a second time, in the same type on the same device."""
        self._lm, self._config = lm, config
        self._model = load_transformers_model(lm.checkpoint, lm.decoder.dtype).to(lm.decoder.device)
        self.options: dict[str, Any] = {}
        if early_exit:
            tuned = lm.configure(config, generation_strategy="self_speculative")
            self.options = {
                "assistant_early_exit": choose_exit_layer(tuned, lm.decoder),
                "num_assistant_tokens": tuned.draft_length,
                "num_assistant_tokens_schedule": "constant",
                "assistant_confidence_threshold": 0.0,
            }

    def run(self, prompt: list[int]) -> Decoded:
        """Decode, timed."""
        config, times = self._config, []
        ids = torch.tensor([prompt], device=self._lm.decoder.device)

        def note_time(_ids: torch.Tensor, _scores: object, **_: object) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(_ids), dtype=torch.bool, device=_ids.device)

        if config.samples:
            torch.manual_seed(config.seed or 0)
        started = time.perf_counter()
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(config.max_new_tokens, self._lm.decoder.max_context - len(prompt)),
            stopping_criteria=[note_time],
            **self._sampling(),
            **self._ends(prompt),
            **self.options,
        )
        tokens = out[0, len(prompt) :].tolist()
        seconds = time.perf_counter() - started
        first = times[0] - started if times else seconds
        stats = {"tokens": len(tokens), "seconds": seconds, "time_to_first_token_s": first}
        return Decoded(text=self._text(tokens), token_ids=tokens, stats=stats)

    def _sampling(self) -> dict[str, Any]:
        config = self._config
        if not config.samples:
            return {"do_sample": False}
        chosen = {"temperature": config.divisor, "top_k": config.top_k, "top_p": config.top_p}
        return {"do_sample": True, **chosen, "min_p": config.min_p or None}

    def _ends(self, prompt: list[int]) -> dict[str, Any]:
        named = self._config.eos_token_ids
        ends = list(self._lm.end_tokens(prompt) if named is None else named)
        padding = {"pad_token_id": ends[0] if ends else 0}
        return {"eos_token_id": None if self._config.ignore_eos or not ends else ends, **padding}

    def _text(self, tokens: list[int]) -> str:
        return str(self._lm.tokenizer.decode(tokens, skip_special_tokens=True))
