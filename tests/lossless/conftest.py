"""Tiny random networks, and the slow decoder that everything is held against."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import layerskip
from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.engine import Committed, decode, make_batch
from layerskip.decoding.sampler import Sampler
from layerskip.language_model import LanguageModel
from layerskip.model.drafts import DraftRequest
from layerskip.model.native.library import load_library
from layerskip.model.native.network import NativeNetwork
from layerskip.model.torch.network import TorchNetwork


@pytest.fixture(scope="session")
def make_lm(
    tmp_path_factory: pytest.TempPathFactory, load_static: Callable[[Path], LanguageModel]
) -> Callable[..., LanguageModel]:
    """Builds a random Llama whose layers from `early` on change little, so that its exits agree now and then."""

    def make(
        *,
        seed: int = 0,
        vocab: int = 48,
        width: int = 32,
        layers: int = 5,
        context: int = 96,
        early: int = 2,
        late: float = 0.25,
        sharpness: float = 3.0,
        kernels: str = "torch",
    ) -> LanguageModel:
        folder: Path = tmp_path_factory.mktemp("tiny")
        inner, kv_width = 48, width // 2
        config = {
            "model_type": "llama",
            "vocab_size": vocab,
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": context,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
        }
        (folder / "config.json").write_text(json.dumps(config))
        generator = torch.Generator().manual_seed(seed)

        def random(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
            return torch.randn(rows, columns, generator=generator) * scale / columns**0.5

        tensors = {
            "model.embed_tokens.weight": random(vocab, width, width**0.5),
            "model.norm.weight": torch.ones(width),
            "lm_head.weight": random(vocab, width, sharpness),
        }
        for index in range(layers):
            weight = 1.0 if index < early else late
            parts = {
                "input_layernorm": torch.ones(width),
                "self_attn.q_proj": random(width, width, 2.0),
                "self_attn.k_proj": random(kv_width, width, 2.0),
                "self_attn.v_proj": random(kv_width, width),
                "self_attn.o_proj": random(width, width, 2.0 * weight),
                "post_attention_layernorm": torch.ones(width),
                "mlp.gate_proj": random(inner, width),
                "mlp.up_proj": random(inner, width),
                "mlp.down_proj": random(width, inner, 2.0 * weight),
            }
            tensors |= {f"model.layers.{index}.{name}.weight": tensor for name, tensor in parts.items()}
        save_file(tensors, folder / "model.safetensors")
        if kernels == "static":
            return load_static(folder)
        return layerskip.load(str(folder), dtype="float32", device="cpu", kernels=kernels)

    return make


@pytest.fixture(scope="session", params=["torch", "native", "static"])
def lm(make_lm: Callable[..., LanguageModel], request: pytest.FixtureRequest) -> LanguageModel:
    """The network of most tests: 5 layers, 48 tokens, a context of 96; by either kind of kernels, in whole rounds."""
    if request.param == "native" and load_library() is None:
        pytest.skip("the compiled kernels weren't built")
    return make_lm(kernels=request.param)


@pytest.fixture(scope="session")
def lm_folder(make_lm: Callable[..., LanguageModel]) -> Path:
    """The checkpoint of the network of most tests."""
    folder = make_lm().checkpoint.hugging_face_folder
    assert folder is not None
    return folder


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Prompts of different lengths, one of a single token."""
    return [[7], [3, 1, 4, 1, 5, 9, 2, 6], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25]]


@pytest.fixture(scope="session")
def slow_decode() -> Callable[..., list[int]]:
    """Autoregressive decoding without a cache: reads the whole text again for each token."""

    def run(lm: LanguageModel, prompt: list[int], **options: Any) -> list[int]:
        config = GenerationConfig(**options)
        sampler = Sampler(config)
        tokens = list(prompt)
        for _ in range(config.max_new_tokens):
            logits = lm.logits(tokens, config.exit_layer)[None, -1:]
            scores = sampler.scores(logits, [[tokens]])
            tokens.append(int(sampler.choose(scores, [config.seed or 0], [len(tokens)])))
            if tokens[-1] in (config.eos_token_ids or ()) and not config.ignore_eos:
                break
        return tokens[len(prompt) :]

    return run


@pytest.fixture(scope="session")
def rounds_of() -> Callable[..., list[Committed]]:
    """What each step commits, the prompt's first token left out."""

    def run(lm: LanguageModel, prompt: list[int], **options: Any) -> list[Committed]:
        config = GenerationConfig(**options)
        batch = make_batch(lm.decoder, [prompt], config, eos_token_ids=(), seed=config.seed or 0)
        return [event for event in decode(batch) if isinstance(event, Committed)][1:]

    return run


@pytest.fixture
def layer_log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Every entry into a layer as it happens: its index, rows and queries."""
    log: list[tuple[int, int, int]] = []
    in_torch, natively = TorchNetwork._run_layer, NativeNetwork.run_layers
    choose, draft = NativeNetwork.choose, NativeNetwork.draft

    def run_layer(self: TorchNetwork, index: int, hidden: Tensor, *rest: Any) -> Tensor:
        log.append((index, hidden.shape[0], hidden.shape[1]))
        return in_torch(self, index, hidden, *rest)

    def run_layers(self: NativeNetwork, hidden: Tensor, positions: Any, cache: Any, start: int, stop: int) -> Tensor:
        log.extend((index, hidden.shape[0], hidden.shape[1]) for index in range(start, stop))
        return natively(self, hidden, positions, cache, start, stop)

    def logged_choose(self: NativeNetwork, inputs: Tensor, *rest: Any) -> Tensor | None:
        found = choose(self, inputs, *rest)
        start, stop = rest[2:4]
        layers = range(0 if found is None else start, 0 if found is None else stop)
        log.extend((index, inputs.shape[0], inputs.shape[1]) for index in layers)
        return found

    def logged_draft(self: NativeNetwork, tokens: Tensor, cache: Any, request: DraftRequest) -> Any:
        found = draft(self, tokens, cache, request)
        passes = 0 if found is None else found.tokens.shape[1] + request.complete
        log.extend((index, len(tokens), 1) for _ in range(passes) for index in range(request.exit_layer))
        return found

    monkeypatch.setattr(NativeNetwork, "choose", logged_choose)
    monkeypatch.setattr(TorchNetwork, "_run_layer", run_layer)
    monkeypatch.setattr(NativeNetwork, "draft", logged_draft)
    monkeypatch.setattr(NativeNetwork, "run_layers", run_layers)
    return log
