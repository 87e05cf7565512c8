"""Folders as the hub has them: each loads as it is, with its end tokens, chat template, first token and scaling right.

The models are small and random; what the files say is what the published ones say (`tests/helpers/hub_folders.py`).
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_folders import DATA, NAMES, SHAPES, make_hub_folder, swap_tokens
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import layerskip
from layerskip.cli.chat import Conversation
from layerskip.cli.main import main
from layerskip.decoding.config import GenerationConfig
from layerskip.evaluation.data.datasets import Example, encode_examples
from layerskip.language_model import LanguageModel
from layerskip.model.config.model_config import FULL, SLIDING
from layerskip.model.rope import inverse_frequencies

TEXT = "The quick brown fox answers 12345 questions: où est la réponse? 😀\n\nIt's in the valley."
QUESTIONS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A fox."},
    {"role": "user", "content": "And the dog?"},
]


@dataclass(frozen=True, kw_only=True)
class Published:
    """What the model's documentation says."""

    ends: tuple[int, ...]
    """Tokens that end an answer."""
    chat: str
    """`QUESTIONS` up to where the answer begins."""
    end_of_turn: str
    """What the template puts after an answer."""


CHATML = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n"
    "<|im_start|>assistant\nA fox.<|im_end|>\n<|im_start|>user\nAnd the dog?<|im_end|>\n<|im_start|>assistant\n"
)
GEMMA = Published(
    ends=(1, 106),
    chat="<bos><start_of_turn>user\nBe brief.\n\nWho are you?<end_of_turn>\n<start_of_turn>model\nA fox.<end_of_turn>\n"
    "<start_of_turn>user\nAnd the dog?<end_of_turn>\n<start_of_turn>model\n",
    end_of_turn="<end_of_turn>",
)
PUBLISHED = {
    "gemma-3-1b-it": GEMMA,
    "gemma-3-270m-it": GEMMA,
    "llama-2-7b-chat": Published(
        ends=(2,),
        chat="<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWho are you? [/INST] A fox. </s><s>[INST] And the dog? [/INST]",
        end_of_turn="</s>",
    ),
    "llama-3.2-1b-instruct": Published(
        ends=(128001, 128008, 128009),
        chat="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: TODAY\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWho are you?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA fox.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "And the dog?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        end_of_turn="<|eot_id|>",
    ),
    "mistral-7b-instruct-v0.3": Published(
        ends=(2,),
        chat="<s>[INST] Who are you?[/INST] A fox.</s>[INST] Be brief.\n\nAnd the dog?[/INST]",
        end_of_turn="</s>",
    ),
    "phi-4-mini-instruct": Published(
        ends=(200020, 199999),
        chat="<|system|>Be brief.<|end|><|user|>Who are you?<|end|><|assistant|>A fox.<|end|><|user|>"
        "And the dog?<|end|><|assistant|>",
        end_of_turn="<|end|>",
    ),
    "qwen2.5-0.5b-instruct": Published(ends=(151645, 151643), chat=CHATML, end_of_turn="<|im_end|>"),
    "qwen3-0.6b": Published(ends=(151645, 151643), chat=CHATML, end_of_turn="<|im_end|>"),
    "smollm2-135m-instruct": Published(ends=(2,), chat=CHATML, end_of_turn="<|im_end|>"),
}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One folder in our decoder and in transformers."""

    name: str
    folder: Path
    ours: LanguageModel
    theirs: Any

    @property
    def published(self) -> Published:
        return PUBLISHED[self.name]

    @property
    def first(self) -> list[int]:
        """What a text begins with: the beginning-of-sequence token, or nothing."""
        begins_with = SHAPES[self.name].begins_with
        return [] if begins_with is None else [self.ours.tokenizer.convert_tokens_to_ids(begins_with)]


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Each model in turn."""
    folder = tmp_path_factory.mktemp("hub") / request.param
    make_hub_folder(request.param, folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = layerskip.load(str(folder), dtype="float32", device="cpu")
    return Pair(name=request.param, folder=folder, ours=ours, theirs=theirs)


def test_every_folder_is_tried() -> None:
    assert {path.name for path in DATA.iterdir()} == set(NAMES) == set(PUBLISHED)


def test_logits(pair: Pair) -> None:
    (tokens,) = pair.ours.encode([TEXT])
    with torch.inference_mode():
        theirs = pair.theirs(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(pair.ours.logits(tokens), theirs, rtol=0, atol=2e-4)


def test_sizes_and_tensors(pair: Pair) -> None:
    raw, config = json.loads((pair.folder / "config.json").read_text()), pair.ours.config
    assert config.vocab_size == raw["vocab_size"]
    assert config.max_position_embeddings == raw["max_position_embeddings"]
    assert config.head_dim == pair.theirs.model.layers[0].self_attn.head_dim
    assert config.tie_word_embeddings == pair.theirs.config.tie_word_embeddings
    assert pair.ours.checkpoint.num_parameters == pair.theirs.num_parameters()


def test_attention_windows(pair: Pair) -> None:
    theirs = pair.theirs.config
    slides = getattr(theirs, "sliding_window", None) is not None and getattr(theirs, "use_sliding_window", True)
    layers = getattr(theirs, "layer_types", None) or [SLIDING if slides else FULL] * theirs.num_hidden_layers
    assert list(pair.ours.config.layer_types) == layers
    if SLIDING in layers:
        assert pair.ours.config.sliding_window == theirs.sliding_window


def test_rotary_embeddings(pair: Pair) -> None:
    """transformers' own tables, kind by kind."""
    theirs, config = pair.theirs.model.rotary_emb, pair.ours.config
    for kind in set(config.layer_types):
        prefix = f"{kind}_" if hasattr(theirs, f"{kind}_inv_freq") else ""
        frequencies, scale = inverse_frequencies(config.ropes[kind], pair.ours.decoder.max_context)
        torch.testing.assert_close(frequencies, getattr(theirs, f"{prefix}inv_freq"), rtol=1e-6, atol=0)
        assert scale == pytest.approx(getattr(theirs, f"{prefix}attention_scaling"))


def test_end_tokens(pair: Pair) -> None:
    assert set(pair.ours.checkpoint.eos_token_ids) == set(pair.published.ends)
    end_of_turn = pair.ours.tokenizer.convert_tokens_to_ids(pair.published.end_of_turn)
    assert end_of_turn in pair.published.ends


def writing(lm: LanguageModel) -> tuple[list[int], list[int], int]:
    """A prompt, what the model writes after it, and the place of a token there that neither had before."""
    (tokens,) = lm.encode([TEXT])
    for length in range(len(tokens), 4, -1):
        prompt = tokens[:length]
        written = lm.generate([prompt], max_new_tokens=12, ignore_eos=True, do_sample=False)[0].token_ids
        for place, token in enumerate(written):
            if place and token not in (*prompt, *written[:place]):
                return prompt, written, place
    raise AssertionError("the model only repeats itself")


def test_every_end_token_ends_a_text(pair: Pair, tmp_path: Path) -> None:
    """The model is changed so that it writes the end token in place of another; transformers stops there as well."""
    prompt, written, place = writing(pair.ours)
    for end in pair.published.ends:
        folder = tmp_path / str(end)
        swap_tokens(pair.folder, folder, written[place], end)
        lm = layerskip.load(str(folder), dtype="float32", device="cpu")
        (result,) = lm.generate([prompt], max_new_tokens=12, do_sample=False, exit_layer=1)
        assert result.token_ids == [*written[:place], end]
        assert (result.finish_reason, result.stop_reason) == ("stop", end)
        assert str(lm.tokenizer.decode([end])) not in result.text
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        output = theirs.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=12, max_length=None, repetition_penalty=1.0
        )
        assert output[0, len(prompt) :].tolist() == result.token_ids


def test_texts_begin_once(pair: Pair) -> None:
    (tokens,) = pair.ours.encode([TEXT])
    assert tokens == Tokenizer.from_file(str(pair.folder / "tokenizer.json")).encode(TEXT).ids
    assert tokens[: len(pair.first)] == pair.first
    assert not set(pair.first) & set(tokens[1:])
    assert pair.ours.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False) == TEXT


def test_chats(pair: Pair) -> None:
    """The published format; the same tokens in `chat`, in data sets and from transformers; one first token."""
    tokenizer, wanted = pair.ours.tokenizer, pair.published.chat.replace("TODAY", f"{datetime.now():%d %b %Y}")
    assert tokenizer.apply_chat_template(QUESTIONS, tokenize=False, add_generation_prompt=True) == wanted
    theirs = tokenizer.apply_chat_template(QUESTIONS, add_generation_prompt=True, return_dict=True)["input_ids"]
    conversation = Conversation(pair.ours, system="Be brief.", template=None)
    conversation.add("Who are you?", "A fox.")
    assert conversation.prompt("And the dog?") == theirs
    example = Example(index=0, prompt=QUESTIONS, reference=None)
    assert encode_examples(pair.ours, [example], GenerationConfig(max_new_tokens=4)) == [theirs]
    assert theirs[: len(pair.first)] == pair.first
    begins = wanted.count(SHAPES[pair.name].begins_with or "\0")
    assert [token for token in theirs if token in pair.first] == pair.first * begins


def test_nothing_is_lost(pair: Pair, capfd: pytest.CaptureFixture[str]) -> None:
    options = ("--exit-layers", "1", "--num-speculations", "3", "--max-new-tokens", "10", "--dtype", "float32")
    code = main(["verify", "--model", str(pair.folder), "--prompt", TEXT, *options, "--json"])
    report = json.loads(capfd.readouterr().out)
    assert (code, report["errors"]) == (0, 0)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes the folder of one model."""

    def write(name: str) -> Path:
        folder = tmp_path_factory.mktemp("one") / name
        make_hub_folder(name, folder)
        return folder

    return write


def test_llama_scales_low_frequencies_only(make: Callable[[str], Path]) -> None:
    rope = layerskip.load(str(make("llama-3.2-1b-instruct")), device="cpu").config.ropes[FULL]
    frequencies, _ = inverse_frequencies(rope, 64)
    unscaled = 500_000.0 ** -(torch.arange(0, 64, 2) / 64)
    ratio = frequencies / unscaled
    assert ratio[0] == pytest.approx(1)
    assert ratio[-1] == pytest.approx(1 / 32)
    assert rope.original_max_position_embeddings == 8192


def test_phi_has_long_factors_for_long_texts(make: Callable[[str], Path]) -> None:
    folder = make("phi-4-mini-instruct")
    raw = json.loads((folder / "config.json").read_text())
    short, long = (layerskip.load(str(folder), device="cpu", max_context=context) for context in (None, 8192))
    assert short.decoder.max_context == 4096
    rope = short.config.ropes[FULL]
    assert rope.rotary_dim == 24  # three quarters of 32
    base = 10_000.0 ** (torch.arange(0, 24, 2) / 24)
    for lm, factors in ((short, "short_factor"), (long, "long_factor")):
        frequencies, scale = inverse_frequencies(lm.config.ropes[FULL], lm.decoder.max_context)
        torch.testing.assert_close(frequencies, 1 / (base * torch.tensor(raw["rope_scaling"][factors])))
        assert scale == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))


@pytest.mark.parametrize("name", ["gemma-3-1b-it", "gemma-3-270m-it"])
def test_both_forms_of_gemma_are_the_same(name: str, make: Callable[[str], Path]) -> None:
    """One counts to the full layers, the other lists all layers."""
    config = layerskip.load(str(make(name)), device="cpu").config
    assert config.layer_types == (SLIDING,) * 5 + (FULL, SLIDING)
    assert (config.ropes[FULL].rope_theta, config.ropes[SLIDING].rope_theta) == (1_000_000.0, 10_000.0)
    assert config.final_logit_softcapping is None
    assert config.attention_scale == 1 / 16


def test_a_template_in_a_file_of_its_own(make: Callable[[str], Path]) -> None:
    """Where newer uploads have it."""
    folder = make("smollm2-135m-instruct")
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    (folder / "chat_template.jinja").write_text(config.pop("chat_template"))
    file.write_text(json.dumps(config))
    lm = layerskip.load(str(folder), device="cpu")
    conversation = Conversation(lm, system="Be brief.", template=None)
    conversation.add("Who are you?", "A fox.")
    assert lm.tokenizer.decode(conversation.prompt("And the dog?")) == CHATML


def test_qwen_forgets_its_thoughts(make: Callable[[str], Path]) -> None:
    """Its template shows the thoughts of no earlier turn, so a conversation's text changes as it goes on."""
    lm = layerskip.load(str(make("qwen3-0.6b")), dtype="float32", device="cpu")
    conversation = Conversation(lm, system=None, template=None)
    first = conversation.prompt("One?")
    (answer,) = lm.stream([first], session=conversation.session, max_new_tokens=5, do_sample=False).run()
    conversation.add("One?", "<think>\nHm.\n</think>\n\nYes.")
    second = conversation.prompt("Two?")
    start = "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"
    assert lm.tokenizer.decode(first) == start
    assert lm.tokenizer.decode(second) == (
        f"{start}Yes.<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
    )
    kept = lm.stream([second], session=conversation.session, max_new_tokens=5, do_sample=False).run()
    fresh = lm.generate([second], max_new_tokens=5, do_sample=False)
    assert answer.token_ids != kept[0].token_ids == fresh[0].token_ids
