"""Imports point one way, and importing the package or asking for help stays cheap."""

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"
PACKAGE = SRC / "layerskip"

# Lowest first. A module may import from its own layer and from the ones before it. "" is layerskip/__init__.py.
LAYERS = [
    {"errors", "checks", "differences", "files", "json_lines", "locks", "machine", "cores"},
    {"text", "model"},
    {"checkpoint"},
    {"decoding"},
    {"structured"},
    {"language_model"},
    {"workers"},
    {"batch", "evaluation", "training", "serving", "export"},
    {"cli", "__main__", ""},
]
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}
TOP = len(LAYERS) - 1
MOST_MODULES = 12
"""In one folder."""


def module_name(path: Path) -> str:
    """src/layerskip/model/cache.py -> layerskip.model.cache, src/layerskip/model/__init__.py -> layerskip.model."""
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute dotted name) of everything imported, wherever in the file the import stands."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=origin, names=names, level=level):
                base = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                prefix = ".".join([*base, *([origin] if origin else [])])
                yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Name(id="import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def unit_of(name: str) -> str | None:
    """Top-level unit behind an absolute dotted name: "model", ...; "" for the public API; None for other packages."""
    parts = name.split(".")
    if parts[0] != "layerskip":
        return None
    unit = parts[1] if len(parts) > 1 else ""
    return unit if unit in HEIGHT or unit in units_on_disk() else ""


def units_on_disk() -> set[str]:
    """Names of the modules and packages directly below src/layerskip that hold Python."""
    modules = {path.stem for path in PACKAGE.glob("*.py") if path.name != "__init__.py"}
    return modules | {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.rglob("*.py"))}


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Describe each import in `source` that points upwards."""
    own_unit = unit_of(module)
    found = []
    for line, name in imported_names(source, module, is_package):
        unit = unit_of(name)
        if unit is None or HEIGHT.get(unit, 0) <= HEIGHT.get(own_unit or "", TOP):  # another test reports unknown units
            continue
        target = f"`{unit}`" if unit else "the public API in layerskip/__init__.py"
        found.append(f"{module}, line {line}: `{own_unit}` must not import {name}: {target} is a higher layer")
    return found


def test_every_top_level_module_has_a_layer() -> None:
    unknown = sorted(units_on_disk() - set(HEIGHT))
    assert not unknown, f"src/layerskip has modules without a layer: {unknown}; give them one in LAYERS, in {__file__}"


def test_imports_point_to_the_same_or_a_lower_layer() -> None:
    found: list[str] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path != PACKAGE / "__init__.py":
            found += violations(path.read_text("utf-8"), module_name(path), path.name == "__init__.py")
    assert not found, "\n".join(["imports that point upwards:", *found])


def imports_between_modules() -> dict[str, set[str]]:
    """For each module of the package, those that it imports, wherever in the file."""
    paths = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for module, path in paths.items():
        names = [name for _, name in imported_names(path.read_text("utf-8"), module, path.name == "__init__.py")]
        modules = {name if name in paths else name.rpartition(".")[0] for name in names}
        found[module] = (modules & set(paths)) - {"layerskip", module}
    return found


def circle(imports: dict[str, set[str]]) -> list[str]:
    """A way along imports from a module back to itself; empty without one."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(imports.get(module, ())):
            if found := visit(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(imports) if (found := visit(module, []))), [])


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(imports_between_modules()) == []


def test_no_packages_import_each_other_in_a_circle() -> None:
    """In each folder: between its modules and packages, each package taken as one."""
    imports, found = imports_between_modules(), []
    for folder in sorted({module_name(path) for path in PACKAGE.rglob("__init__.py")}):
        depth = len(folder.split(".")) + 1
        units: dict[str, set[str]] = {}
        for module, others in imports.items():
            unit = ".".join(module.split(".")[:depth])
            if module.startswith(f"{folder}."):
                inside = {".".join(other.split(".")[:depth]) for other in others if other.startswith(f"{folder}.")}
                units.setdefault(unit, set()).update(inside - {unit})
        found += [circle(units)] if circle(units) else []
    assert found == []


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_folders_are_small() -> None:
    sizes = {str(folder.relative_to(SRC)): len([*folder.glob("*.py")]) for folder in (PACKAGE, *PACKAGE.rglob("*/"))}
    most = MOST_MODULES + 1  # `__init__.py`
    assert {name: size for name, size in sizes.items() if size > most} == {}


def test_no_prefix_stands_for_a_folder() -> None:
    """Three modules whose names begin with the same word belong into a folder of that name."""
    found = []
    for folder in (PACKAGE, *PACKAGE.rglob("*/")):
        words = Counter(path.stem.split("_")[0] for path in folder.glob("*.py") if not path.stem.startswith("_"))
        found += [f"{folder.relative_to(SRC)}/{word}_*" for word, count in words.items() if count >= 3]
    assert found == []


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import layerskip.decoding.policy", "layerskip.model.cache"),
        ("from layerskip.checkpoint.checkpoint import open_checkpoint", "layerskip.model.cache"),
        ("from layerskip import cli", "layerskip.evaluation.report"),
        ("from layerskip import load", "layerskip.evaluation.report"),
        ("from ..decoding import policy", "layerskip.model.cache"),
        ("from .. import decoding", "layerskip.model.cache"),
        ("def f():\n    from layerskip.model.cache import KVCache", "layerskip.errors"),
        ("if TYPE_CHECKING:\n    from layerskip.language_model import X", "layerskip.decoding.policy"),
        ("importlib.import_module('layerskip.serving.app')", "layerskip.language_model"),
    ],
)
def test_an_upward_import_is_found(source: str, module: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import torch\nfrom transformers import AutoTokenizer", "layerskip.model.cache"),
        ("from layerskip.errors import LayerSkipError", "layerskip.model.cache"),
        ("from .config import ModelConfig\nfrom . import rope", "layerskip.model.cache"),
        ("from layerskip.training import data", "layerskip.evaluation.data.datasets"),
        ("from layerskip.machine import __version__", "layerskip.evaluation.report"),
        ("from layerskip import load, errors", "layerskip.cli.main"),
    ],
)
def test_other_imports_are_let_through(source: str, module: str) -> None:
    assert violations(source, module) == []


def modules_loaded_by(code: str) -> set[str]:
    """Run `code` in a fresh interpreter; return the names of the top-level modules that it loaded."""
    report = "\nimport json, sys\nprint(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    result = subprocess.run(
        [sys.executable, "-c", code + report], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert modules_loaded_by("import layerskip").isdisjoint({"torch", "transformers", "rich", "tyro"})


def packages_beyond_torch(code: str) -> set[str]:
    """Packages that a process loads for `code`, but not for torch, Python's own left out."""
    return modules_loaded_by(code) - modules_loaded_by("import torch") - sys.stdlib_module_names - {"layerskip"}


def test_generating_loads_what_the_call_needs() -> None:
    """Not transformers, nor what draws on terminals, renders templates, downloads or reads other formats."""
    code = """
from layerskip import load
lm = load("demo")
assert lm.generate("def f(", max_new_tokens=4, stop="zzz")[0].text
assert lm.generate("def f(", max_new_tokens=4, temperature=0.7, top_k=5, seed=1, exit_layer=4)[0].text
"""
    assert packages_beyond_torch(code) <= {"safetensors", "tokenizers"}


@pytest.mark.parametrize("options", ["", "--json", "--temperature 0.7 --top-p 0.9 --seed 1"])
def test_the_command_loads_its_flags_parser_besides(options: str) -> None:
    argv = ["generate", "--prompt", "def f(", "--max-new-tokens", "4", *options.split()]
    code = f"from layerskip.cli.main import main\nassert main({argv}) == 0"
    parser = {"tyro", "docstring_parser", "typeguard", "typing_extensions"}
    assert packages_beyond_torch(code) <= {"safetensors", "tokenizers", *parser}


def test_a_conversation_loads_jinja2() -> None:
    code = """
from layerskip import load
lm = load("demo")
template = "{% for m in messages %}{{ m.content }}{% endfor %}"
prompt = lm.encode_chat([{"role": "user", "content": "def f("}], template=template)
assert lm.generate([prompt], max_new_tokens=4)[0].text
"""
    assert packages_beyond_torch(code) <= {"safetensors", "tokenizers", "jinja2", "markupsafe"}


def test_help_does_not_load_torch() -> None:
    code = """
from layerskip.cli.main import main
try:
    status = main(["--help"])
except SystemExit as stop:
    status = stop.code
assert not status, f"--help ended with status {status!r}"
"""
    assert modules_loaded_by(code).isdisjoint({"torch", "transformers"})
