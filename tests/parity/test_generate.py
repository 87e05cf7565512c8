"""Greedy texts equal transformers', both plainly decoded and self-speculated."""

from typing import Any

import pytest
import torch
from engines import generate
from transformers import AutoModelForCausalLM, AutoTokenizer

import layerskip

NUM_NEW = 24


@torch.inference_mode()
def their_text(model: Any, prompt: list[int], num_new: int = NUM_NEW) -> list[int]:
    ids = torch.tensor([prompt])
    text = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_new)
    return text[0, len(prompt) :].tolist()


def test_tiny_models(pair: Any) -> None:
    original = 32 if pair.case.max_context else 0  # transformers takes the long factors only for longer texts
    prompts = [pair.tokens[: original + 4], pair.tokens[::-1][: original + 7]]
    wanted = [their_text(pair.theirs, prompt) for prompt in prompts]
    assert len({token for text in wanted for token in text}) > 4, "a text that repeats itself proves little"
    for options in (
        {"generation_strategy": "autoregressive"},
        {"generation_strategy": "self_speculative", "exit_layer": 2, "num_speculations": 3},
    ):
        options |= {"max_new_tokens": NUM_NEW, "temperature": 0}
        assert [result.token_ids for result in pair.ours.generate(prompts, **options)] == wanted, options
        # in several chunks, the last one not full
        assert generate(pair.ours.decoder, prompts, prefill_chunk=11, ignore_eos=True, **options) == wanted, options


@pytest.mark.parametrize("prompt", ["def add(a, b):", "Once upon a time"])
def test_demo(demo: Any, prompt: str) -> None:
    lm, theirs, tokenizer = demo
    ids = tokenizer(prompt)["input_ids"]
    assert lm.encode([prompt]) == [ids]
    wanted = their_text(theirs, ids)
    for strategy in ("autoregressive", "self_speculative"):
        (result,) = lm.generate([ids], max_new_tokens=NUM_NEW, temperature=0, generation_strategy=strategy)
        assert list(result.token_ids) == wanted, strategy


@pytest.fixture(scope="module")
def demo() -> Any:
    lm = layerskip.load("demo", dtype="float32", device="cpu")
    folder = lm.checkpoint.hugging_face_folder
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return lm, theirs, AutoTokenizer.from_pretrained(folder)
