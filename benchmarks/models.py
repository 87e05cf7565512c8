"""Models for benchmarks, by name, and prompts for each."""

import json
import sys
from pathlib import Path
from typing import Annotated

import torch
from synthetic import SHAPES, make_synthetic, make_untrained, random_prompts

import layerskip
from layerskip.checkpoint.checkpoint import DEMO_FOLDER
from layerskip.checkpoint.names import MODELS, resolve
from layerskip.errors import TokenizerError

UNTRAINED = {"untrained": None, "untrained-240m": "240m", "untrained-1b": "1b"}
"""Names of models with random weights, none of whose exits agrees, and their shapes; None is the embedded model's
shape."""
LARGE = ("1b", "8b")
"""Shapes whose weights benchmarks make in bfloat16, to save memory."""

MODEL_HELP = (
    f"demo, {', '.join(MODELS)}, a shape with random weights ({', '.join(SHAPES)}; {', '.join(UNTRAINED)}: no exit "
    "agrees), a folder, a GGUF file or a hub id."
)
try:
    from tyro.conf import arg
except ImportError:  # `on_gpu.py` runs benchmarks without their command lines
    ModelName = str
else:
    ModelName = Annotated[str, arg(help=MODEL_HELP)]  # type: ignore[misc]
REQUEST = "Complete this Python code:\n\n{prompt}"
"""Question for a model with a chat template."""


def prepare(
    model: str,
    scratch: Path,
    *,
    exit_layer: int | None = None,
    agreement: float = 0.9,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> str:
    """A name for `layerskip.load`; models with random weights are written to a folder first.

    Args:
        model: A `ModelName`.
        scratch: A folder; a model with random weights that is there already isn't made again.
        exit_layer: Exit layer of a shape that is to agree with the last layer; a quarter of the layers if not given.
        agreement: Share of random tokens on which the exit agrees.
        dtype: Type of a shape's weights.
        device: Device on which a shape's agreement is calibrated.
    """
    if (model in SHAPES or model in UNTRAINED) and (scratch / "config.json").exists():
        return str(scratch)
    if model in SHAPES:
        reached = make_synthetic(
            scratch,
            model,
            exit_layer=exit_layer or max(1, SHAPES[model]["num_hidden_layers"] // 4),
            agreement=agreement,
            dtype=dtype,
            device=device,
        )
        print(f"{model}: random weights, the exit agrees on {reached:.2f} of random tokens", file=sys.stderr)
        return str(scratch)
    if model in UNTRAINED:
        make_untrained(scratch, UNTRAINED[model] or DEMO_FOLDER)
        return str(scratch)
    return model


def load_prompts(lm: layerskip.LanguageModel, file: Path, count: int) -> list[list[int]]:
    """Token ids of the first prompts of a file of JSON lines with a field `prompt`.

    A model with a chat template is asked to complete the prompts; one without a tokenizer gets random tokens.
    """
    try:
        tokenizer = lm.tokenizer
    except TokenizerError as error:
        print(f"the prompts are random tokens: {error}", file=sys.stderr)
        return random_prompts(lm.config.vocab_size, count)
    prompts = [json.loads(line)["prompt"] for line in file.read_text("utf-8").splitlines()[:count]]
    if not tokenizer.chat_template:
        return lm.encode(prompts)
    chats = [[{"role": "user", "content": REQUEST.format(prompt=prompt)}] for prompt in prompts]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    return lm.encode(texts, special_tokens=False)


def long_prompts(lm: layerskip.LanguageModel, file: Path, count: int, length: int) -> list[list[int]]:
    """Prompts of a number of tokens: the texts of a file one after another, each prompt from another one on.

    A model without a tokenizer gets random tokens.
    """
    texts = [json.loads(line)["prompt"] for line in file.read_text("utf-8").splitlines()]
    prompts = []
    for i in range(count):
        begin = i % len(texts)
        text = "\n\n".join(texts[begin:] + texts[:begin])
        try:
            tokens = lm.encode([text])[0]
        except TokenizerError:
            return random_prompts(lm.config.vocab_size, count, length)
        while len(tokens) < length:
            tokens = [*tokens, *tokens]
        prompts.append(tokens[:length])
    return prompts


def gguf_file(model: str) -> Path | None:
    """The GGUF file of a model's name; None if the model isn't a GGUF file."""
    found = resolve(model) if model in MODELS else Path(model).expanduser()
    return found if isinstance(found, Path) and found.suffix == ".gguf" and found.is_file() else None
