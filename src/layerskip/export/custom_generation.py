"""A folder with which transformers decodes self-speculatively, where this package is not installed.

transformers runs `custom_generate/generate.py` of a folder in `model.generate(custom_generate=FOLDER)`, and in every
`generate` of a model that was loaded from it. The modules are in `custom_generate/` beside this one.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from layerskip.checkpoint.checkpoint import Checkpoint
from layerskip.checkpoint.tuned import read_tuned
from layerskip.errors import InvalidArgumentError

MODULES = "custom_generate"
"""The folder that transformers looks for; also the package here that is copied into it."""
REQUIREMENTS = "torch\ntransformers>=4.57\n"
README = """---
library_name: transformers
tags:
- custom_generate
- self-speculative-decoding
- layerskip
---

# Self-speculative decoding
The first layers of a model draft tokens, and the rest of the same model verifies them, with one cache for both
([LayerSkip](https://arxiv.org/abs/2404.16710)). The text is the one that the model generates without drafts.

```python
{snippet}
```

Works with decoder-only models of transformers whose layers keep keys and values of single tokens: Llama, Mistral, Qwen
2 and 3, Gemma 1 to 3, Phi 3, OLMo 2, Granite, SmolLM 3 and others. It is faster where the early layers predict well,
as in models that were trained with LayerSkip's recipe.

| argument | meaning |
|---|---|
| `exit_layer` | number of layers that draft; {exit_layer} by default |
| `num_speculations` | tokens drafted in one round; {num_speculations} by default |
| `confidence` | drafting ends before a token whose probability is below this; by default, all tokens are drafted |
| `seed` | seed for `do_sample`: the text is the same for any `exit_layer` and `num_speculations` |

Prompts of a batch are padded on the left. Beam search, several sequences for a prompt, and attentions or hidden states
as output are refused.
"""


@dataclass(frozen=True, kw_only=True)
class CustomGeneration:
    """What was written."""

    folder: Path
    """Where to."""
    exit_layer: int | None
    """Layers that draft by default; None: a third of the model's."""
    num_speculations: int
    """Tokens drafted in one round by default."""
    has_model: bool
    """Whether the model's files are there too."""
    snippet: str
    """Python that generates with it."""


def write_custom_generation(
    folder: Path,
    checkpoint: Checkpoint | None = None,
    *,
    exit_layer: int | None = None,
    num_speculations: int | None = None,
) -> CustomGeneration:
    """Write the folder; until it is complete, it has another name.

    Args:
        folder: Where to: a folder that doesn't exist yet, or is empty.
        checkpoint: A model. Its tuned or trained exit becomes the default; in Hugging Face's format, its files are
            linked into the folder, so that `from_pretrained` loads it from there.
        exit_layer: Layers that draft by default; if not given, the model's own setting.
        num_speculations: Tokens drafted in one round by default; if not given, the model's own setting, or 4.

    Raises:
        InvalidArgumentError: The folder is in use or can't be written, or the model has no such exit.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidArgumentError(f"{folder} is there already; name another folder, or remove it")
    exit_layer, num_speculations = _defaults(checkpoint, exit_layer, num_speculations)
    model = None if checkpoint is None else checkpoint.hugging_face_folder
    written = CustomGeneration(
        folder=folder,
        exit_layer=exit_layer,
        num_speculations=num_speculations,
        has_model=model is not None,
        snippet=_snippet(folder, exit_layer, num_speculations, has_model=model is not None),
    )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent) as scratch:
            staging = Path(scratch) / "folder"
            staging.mkdir()
            _write_files(staging, model, written)
            os.replace(staging, folder)  # also over an empty folder
    except OSError as error:
        raise InvalidArgumentError(f"{folder} can't be written: {error.strerror or error}") from error
    return written


def _defaults(
    checkpoint: Checkpoint | None, exit_layer: int | None, num_speculations: int | None
) -> tuple[int | None, int]:
    """Exit layer and number of drafts: as given, else as tuned, else as trained."""
    for name, value in (("exit_layer", exit_layer), ("num_speculations", num_speculations)):
        if value is not None and value < 1:
            raise InvalidArgumentError(f"{name} is {value}; use a whole number from 1")
    if checkpoint is not None:
        num_layers = _num_layers(checkpoint)
        if exit_layer is not None and exit_layer >= num_layers:
            raise InvalidArgumentError(
                f"exit layer {exit_layer} is not an exit of {checkpoint.name}, which has {num_layers} layers; use 1 to "
                f"{num_layers - 1}"
            )
        tuned = read_tuned(checkpoint.files.tuned_file, num_layers)
        if exit_layer is None and tuned is not None:
            exit_layer, num_speculations = tuned.exit_layer, num_speculations or tuned.num_speculations
        exit_layer = exit_layer or _trained_exit(checkpoint, num_layers)
    return exit_layer, num_speculations or 4


def _num_layers(checkpoint: Checkpoint) -> int:
    """The model's layers, also of families that only transformers can run."""
    config = checkpoint.raw_config
    text_config = config.get("text_config")
    num_layers = (text_config if isinstance(text_config, dict) else config).get("num_hidden_layers")
    return num_layers if isinstance(num_layers, int) else checkpoint.config.num_layers


def _trained_exit(checkpoint: Checkpoint, num_layers: int) -> int | None:
    """The first exit that the model was trained for, as training notes it in config.json."""
    recipe = checkpoint.raw_config.get("layerskip")
    exits = recipe.get("exit_layers") if isinstance(recipe, dict) else None
    trained = [exit_layer for exit_layer in exits or () if isinstance(exit_layer, int) and 1 <= exit_layer < num_layers]
    return min(trained, default=None)


def _write_files(staging: Path, model: Path | None, written: CustomGeneration) -> None:
    target = staging / MODULES
    target.mkdir()
    for module in files("layerskip.export").joinpath(MODULES).iterdir():
        if module.name.endswith(".py") and module.name not in ("__init__.py", "defaults.py"):
            (target / module.name).write_bytes(module.read_bytes())
    (target / "defaults.py").write_text(
        '"""What `generate` takes where a call names nothing."""\n\n'
        f"EXIT_LAYER: int | None = {written.exit_layer!r}\n"
        f"NUM_SPECULATIONS: int = {written.num_speculations!r}\n",
        encoding="utf-8",
    )
    (target / "requirements.txt").write_text(REQUIREMENTS, encoding="utf-8")
    if model is not None:
        _link_files(model, staging)
    readme = staging / "README.md"
    if readme.exists():  # the model's own
        readme = target / "README.md"
    exit_layer = written.exit_layer or "a third of the layers"
    text = README.format(snippet=written.snippet, exit_layer=exit_layer, num_speculations=written.num_speculations)
    readme.write_text(text, encoding="utf-8")


def _link_files(source: Path, target: Path) -> None:
    """Hard links to a folder's files; copies where the file system has no links across these folders."""
    for path in sorted(source.iterdir()):
        file = path.resolve()  # the hub's cache consists of symbolic links
        if not file.is_file() or path.name.startswith("."):
            continue
        try:
            os.link(file, target / path.name)
        except OSError:
            shutil.copyfile(file, target / path.name)


def _snippet(folder: Path, exit_layer: int | None, num_speculations: int, *, has_model: bool) -> str:
    path = str(folder.resolve())
    options = ", ".join(
        [*([] if exit_layer is None else [f"exit_layer={exit_layer}"]), f"num_speculations={num_speculations}"]
    )
    if has_model:
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"folder = {path!r}\n"
            "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
            "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
            'inputs = tokenizer("def add(a, b):", return_tensors="pt")\n'
            f"output = model.generate(**inputs, max_new_tokens=64, {options})\n"
            "print(tokenizer.decode(output[0]))"
        )
    return (
        "output = model.generate(\n"
        "    **inputs,\n"
        "    max_new_tokens=64,\n"
        f"    custom_generate={path!r},\n"
        "    trust_remote_code=True,\n"
        f"    {options.replace(', ', chr(10).join([',', '    ']))},\n"
        ")"
    )
