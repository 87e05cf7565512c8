"""The folder that transformers runs: where it goes, what its defaults are, and that it needs no layerskip."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerskip.checkpoint.checkpoint import open_checkpoint
from layerskip.checkpoint.tuned import TunedSettings, write_tuned
from layerskip.errors import InvalidArgumentError, UnsupportedModelError
from layerskip.export.custom_generation import write_custom_generation

TinyCheckpoint = Callable[..., Path]
WITHOUT_LAYERSKIP = """
import importlib.abc, json, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "layerskip":
            raise ModuleNotFoundError("No module named 'layerskip'")

sys.meta_path.insert(0, Refuse())
try:
    import layerskip
except ModuleNotFoundError:
    pass
else:
    sys.exit("layerskip should be blocked")

import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
with_model, code = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(with_model)
ids = torch.arange(3, 12).unsqueeze(0)
options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
outputs = [
    model.generate(ids, **options),
    model.generate(ids, **options, custom_generate=code, trust_remote_code=True, exit_layer=2, num_speculations=3),
    model.generate(input_ids=ids, **options, custom_generate=with_model, trust_remote_code=True),
]
loaded = AutoModelForCausalLM.from_pretrained(with_model, trust_remote_code=True)
outputs += [loaded.generate(ids, **options), loaded.generate(input_ids=ids, exit_layer=1, **options)]
calls = []
loaded.model.layers[-1].register_forward_hook(lambda *_: calls.append(1))
loaded.generate(ids, num_speculations=1, **options)
print(json.dumps({"outputs": [output.tolist() for output in outputs], "calls": len(calls)}))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import write_agreeing

    folder = tmp_path_factory.mktemp("model")
    write_agreeing(folder)
    return folder


def test_the_folders_work_without_this_package(model: Path, tmp_path: Path) -> None:
    write_custom_generation(tmp_path / "with_model", open_checkpoint(str(model)), exit_layer=2)
    write_custom_generation(tmp_path / "code")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_LAYERSKIP, str(tmp_path / "with_model"), str(tmp_path / "code")],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert all(output == report["outputs"][0] for output in report["outputs"])
    assert report["calls"] < 24  # a model loaded from the folder drafts


def test_modules_import_torch_transformers_and_each_other_only(tmp_path: Path) -> None:
    import ast

    write_custom_generation(tmp_path / "code")
    folder = tmp_path / "code" / "custom_generate"
    modules = {path.stem for path in folder.glob("*.py")}
    assert "generate" in modules
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                tops = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                tops = {str(node.module).partition(".")[0]}
            elif isinstance(node, ast.ImportFrom):
                assert (node.level, node.module in modules) == (1, True), path
                continue
            else:
                continue
            assert tops <= {"torch", "transformers", *sys.stdlib_module_names}, path


def test_the_entry_imports_every_module(tmp_path: Path) -> None:
    """transformers 4 copies what the entry imports, and nothing that those modules import."""
    folder = write_custom_generation(tmp_path / "code").folder / "custom_generate"
    entry = (folder / "generate.py").read_text("utf-8")
    others = {path.stem for path in folder.glob("*.py")} - {"generate"}
    assert set(re.findall(r"^from \.(\w+) import", entry, re.MULTILINE)) == others


def defaults(folder: Path) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec((folder / "custom_generate" / "defaults.py").read_text("utf-8"), names)
    return {name: names[name] for name in ("EXIT_LAYER", "NUM_SPECULATIONS")}


def test_defaults_are_given_tuned_or_trained(model: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint("demo")
    write_custom_generation(tmp_path / "trained", checkpoint)
    assert defaults(tmp_path / "trained") == {"EXIT_LAYER": 4, "NUM_SPECULATIONS": 4}
    write_custom_generation(tmp_path / "given", checkpoint, exit_layer=3, num_speculations=7)
    assert defaults(tmp_path / "given") == {"EXIT_LAYER": 3, "NUM_SPECULATIONS": 7}
    write_custom_generation(tmp_path / "none")
    assert defaults(tmp_path / "none") == {"EXIT_LAYER": None, "NUM_SPECULATIONS": 4}

    linked = write_custom_generation(tmp_path / "copy", open_checkpoint(str(model))).folder
    write_tuned(
        open_checkpoint(str(linked)).files.tuned_file,
        TunedSettings(exit_layer=2, num_speculations=6, tokens_per_second=1.0, speedup=1.0),
    )
    written = write_custom_generation(tmp_path / "tuned", open_checkpoint(str(linked)))
    assert defaults(tmp_path / "tuned") == {"EXIT_LAYER": 2, "NUM_SPECULATIONS": 6}
    assert "exit_layer=2, num_speculations=6" in written.snippet


def test_a_models_files_are_linked_and_its_readme_kept(tmp_path: Path) -> None:
    demo = open_checkpoint("demo")
    written = write_custom_generation(tmp_path / "out", demo)
    source = demo.hugging_face_folder
    assert written.has_model
    assert source is not None
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert "- custom_generate\n" in (tmp_path / "out" / "custom_generate" / "README.md").read_text("utf-8")
    code = write_custom_generation(tmp_path / "code")
    assert not code.has_model
    assert sorted(path.name for path in (tmp_path / "code").iterdir()) == ["README.md", "custom_generate"]
    assert "transformers>=" in (tmp_path / "code" / "custom_generate" / "requirements.txt").read_text("utf-8")


def test_the_snippet_runs(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write_custom_generation(tmp_path / "out", open_checkpoint("demo"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    names: dict[str, Any] = {}
    exec(written.snippet, names)
    assert names["output"].shape[1] > 10


def test_families_that_only_transformers_runs_are_exported_too(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint("cohere")))
    with pytest.raises(UnsupportedModelError):
        _ = checkpoint.config
    assert write_custom_generation(tmp_path / "out", checkpoint, exit_layer=3).has_model
    with pytest.raises(InvalidArgumentError, match="which has 4 layers"):
        write_custom_generation(tmp_path / "new", checkpoint, exit_layer=4)


def test_a_folder_in_use_and_wrong_settings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InvalidArgumentError, match="is there already"):
        write_custom_generation(tmp_path / "full")
    (tmp_path / "empty").mkdir()
    write_custom_generation(tmp_path / "empty")
    with pytest.raises(InvalidArgumentError, match="exit layer 16 is not an exit of demo, which has 16 layers"):
        write_custom_generation(tmp_path / "new", open_checkpoint("demo"), exit_layer=16)
    with pytest.raises(InvalidArgumentError, match="num_speculations is 0"):
        write_custom_generation(tmp_path / "new", num_speculations=0)
    with pytest.raises(InvalidArgumentError, match="can't be written"):
        write_custom_generation(tmp_path / "full" / "file" / "below")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]  # nothing half written is left
