"""Weights that are broken, or overflow: one error that names the dtype, whatever decodes or measures."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import layerskip
from layerskip.cli.main import main
from layerskip.errors import InvalidArgumentError, NotFiniteError
from layerskip.language_model import LanguageModel
from layerskip.model.native.library import load_library

Tiny = Callable[..., Path]
PROMPTS = [[5, 3, 80, 41, 9], [7, 7, 2]]
EARLY_EXIT: dict[str, Any] = {"generation_strategy": "early_exit", "exit_layer": 2}
STRATEGIES: list[dict[str, Any]] = [
    {"generation_strategy": "autoregressive"},
    EARLY_EXIT,
    {"generation_strategy": "self_speculative", "exit_layer": 2, "num_speculations": 3},
    {"generation_strategy": "ngram"},
    {"generation_strategy": "adaptive"},
]
SAMPLING: list[dict[str, Any]] = [
    {"do_sample": False},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 0.8, "seed": 1, "acceptance": "rejection"},
    {"do_sample": False, "repetition_penalty": 1.1},
]
BREAKS = {
    "a layer": ("model.layers.1.mlp.down_proj.weight", torch.nan),
    "a row of the head": ("lm_head.weight", torch.nan),
    "an infinite weight": ("lm_head.weight", torch.inf),
    "the embedding": ("model.embed_tokens.weight", torch.nan),
}
KERNELS = [
    "torch",
    pytest.param("native", marks=pytest.mark.skipif(load_library() is None, reason="kernels weren't built")),
]


def broken(tiny_checkpoint: Tiny, folder: Path, name: str, value: float, row: int = 5, **options: Any) -> Path:
    """A checkpoint with one weight that is not a finite number."""
    shutil.copytree(tiny_checkpoint(num_hidden_layers=4, **options), folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    tensors[name][row, 3] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("what", BREAKS)
def test_nothing_is_generated_from_broken_weights(
    tiny_checkpoint: Tiny, tmp_path: Path, what: str, kernels: Any
) -> None:
    lm = layerskip.load(str(broken(tiny_checkpoint, tmp_path, *BREAKS[what])), device="cpu", kernels=kernels)
    for strategy in STRATEGIES:
        for sampling in SAMPLING:
            with pytest.raises(NotFiniteError, match=r"logits in float32 .* weights are broken"):
                lm.generate(PROMPTS, max_new_tokens=12, **strategy, **sampling)
    for call in (lambda: lm.logits(PROMPTS[0]), lambda: lm.score(PROMPTS)):
        with pytest.raises(NotFiniteError, match="float32"):
            call()


@pytest.mark.parametrize("kernels", KERNELS)
def test_weights_that_break_later_on(tiny_checkpoint: Tiny, tmp_path: Path, kernels: Any) -> None:
    """A prompt may be read well, and a token come up later whose embedding is broken."""
    plain = layerskip.load(str(tiny_checkpoint(num_hidden_layers=4)), device="cpu", kernels=kernels)
    token = plain.generate([PROMPTS[0]], max_new_tokens=8, do_sample=False)[0].token_ids[4]
    folder = broken(tiny_checkpoint, tmp_path, "model.embed_tokens.weight", torch.nan, row=token)
    lm = layerskip.load(str(folder), device="cpu", kernels=kernels)
    for strategy in (strategy for strategy in STRATEGIES if strategy != EARLY_EXIT):  # which generates another text
        with pytest.raises(NotFiniteError):
            lm.generate([PROMPTS[0]], max_new_tokens=12, do_sample=False, **strategy)


def test_whole_rounds(tiny_checkpoint: Tiny, tmp_path: Path, load_static: Callable[[Path], LanguageModel]) -> None:
    folder = broken(tiny_checkpoint, tmp_path, *BREAKS["a layer"])
    for strategy in STRATEGIES:
        with pytest.raises(NotFiniteError):
            load_static(folder).generate(PROMPTS, max_new_tokens=12, do_sample=False, **strategy)


def test_float16_that_overflows(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = broken(tiny_checkpoint, tmp_path, "model.layers.1.mlp.down_proj.weight", 3e38)
    with pytest.raises(NotFiniteError, match=r"logits in float16 .*float16 may have overflowed: try bfloat16"):
        layerskip.load(str(folder), device="cpu", dtype="float16").generate(PROMPTS, max_new_tokens=4)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_penalties_that_forbid_every_token(tiny_checkpoint: Tiny, strategy: dict[str, Any]) -> None:
    lm = layerskip.load(str(tiny_checkpoint(vocab_size=4, num_hidden_layers=4)), device="cpu")
    with pytest.raises(NotFiniteError, match="no token is allowed"):
        lm.generate([[0, 1, 2, 3]], max_new_tokens=40, no_repeat_ngram_size=1, **strategy)


def test_penalties_beyond_all_measure() -> None:
    for penalty in (1e-300, 1e-7, 1e7, 1e300, float("nan"), float("inf"), 0, -1):
        with pytest.raises(InvalidArgumentError, match=r"repetition_penalty must be from 1e-06 to 1000000\.0"):
            layerskip.GenerationConfig(repetition_penalty=penalty)
    for name in ("temperature", "top_p", "min_p"):
        with pytest.raises(InvalidArgumentError, match=f"{name} must be"):
            layerskip.GenerationConfig(**{name: float("nan")})


@pytest.mark.parametrize("command", ["generate", "verify", "inspect"])
def test_commands_say_so_in_one_line(
    tiny_checkpoint: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    folder = broken(tiny_checkpoint, tmp_path / "model", name, torch.nan, tokenizer=True)
    (tmp_path / "prompts.txt").write_text("a b")
    arguments = {
        "generate": ["--prompt", "a"],
        "verify": ["--prompts", str(tmp_path / "prompts.txt")],
        "inspect": ["--prompt", "a b c d e f"],
    }[command]
    capsys.readouterr()  # what writing the checkpoint printed
    assert main([command, "--model", str(folder), *arguments, "--json"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.strip().count("\n") == 0
    assert "float32" in printed.err
