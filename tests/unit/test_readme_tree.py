"""The annotated tree in README.md names what is on disk, no less and nothing else.

The tree is the fenced block whose first line is `layerskip/`. Below it stands one entry a line, indented by four spaces
a level: a name, and after two or more spaces a comment. Folders end in `/`; `src/layerskip/` may stand on one line.

Required: everything at the top level but hidden names, and every folder directly in src/layerskip/. Others may be named
too, as long as they exist. What a module is for stands in its own docstring.
"""

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[2]
INDENT = 4


def tree_block(markdown: str) -> list[str]:
    """Lines of the fenced tree, without its first line and without blank lines."""
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL):
        first, *rest = block.splitlines() or [""]
        if first.split("  ")[0].rstrip() == "layerskip/":
            return [line for line in rest if line.strip()]
    raise AssertionError("README.md has no fenced block that starts with the line `layerskip/`")


def parse_tree(lines: Iterable[str]) -> list[str]:
    """Turn indented lines into paths from the root; folders end in "/"."""
    parents: list[str] = []
    paths = []
    for line in lines:
        entry = re.fullmatch(r"( *)([^\s│├└─]+)(?: {2,}\S.*)?", line.rstrip())
        assert entry, f"not `name  comment`, indented by spaces: {line!r}"
        depth, remainder = divmod(len(entry[1]), INDENT)
        assert remainder == 0, f"not indented by a multiple of {INDENT} spaces: {line!r}"
        assert 1 <= depth <= len(parents) + 1, f"indented by too many or too few levels: {line!r}"
        del parents[depth - 1 :]
        paths.append("".join(parents) + entry[2])
        if entry[2].endswith("/"):
            parents.append(entry[2])
    return paths


def files_on_disk(root: Path) -> list[str]:
    """Paths of all files that are tracked, or would be: from git where there is one, else from a walk."""
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            return [name for name in result.stdout.split("\0") if name and (root / name).exists()]
    return walk(root)


def walk(root: Path) -> list[str]:
    """List files without git; .gitignore's patterns are taken as names, or as paths where they hold a slash."""
    ignore_file = root / ".gitignore"
    lines = ignore_file.read_text("utf-8").splitlines() if ignore_file.exists() else []
    patterns = [line.strip("/ ") for line in lines if line.strip() and not line.startswith("#")] + [".git"]

    def ignored(path: str) -> bool:
        return any(fnmatch(path if "/" in pattern else PurePosixPath(path).name, pattern) for pattern in patterns)

    found = []
    for folder, subfolders, names in os.walk(root):
        prefix = Path(folder).relative_to(root)
        subfolders[:] = [name for name in subfolders if not ignored((prefix / name).as_posix())]
        found += [(prefix / name).as_posix() for name in names if not ignored((prefix / name).as_posix())]
    return found


def with_folders(paths: Iterable[str]) -> set[str]:
    """Add to `paths` the folders that they lie in."""
    everything = set(paths)
    for path in list(everything):
        everything |= {f"{parent}/" for parent in PurePosixPath(path).parents if str(parent) != "."}
    return everything


def is_required(path: str) -> bool:
    """Whether the tree must name this file or folder."""
    parts = PurePosixPath(path).parts
    if parts[:2] == ("src", "layerskip"):
        return path.endswith("/") and len(parts) <= 3
    return len(parts) == 1 and not path.startswith(".")


def test_readme_tree_is_true() -> None:
    readme = ROOT / "README.md"
    assert readme.exists(), "README.md is missing; it holds the annotated tree"
    listed = parse_tree(tree_block(readme.read_text("utf-8")))
    exists = with_folders(files_on_disk(ROOT))
    missing = {path for path in exists if is_required(path)} - with_folders(listed)
    problems = {
        "on disk, missing in README.md's tree": sorted(missing),
        "in README.md's tree, not on disk": sorted(with_folders(listed) - exists),
        "twice in README.md's tree": sorted(path for path, count in Counter(listed).items() if count > 1),
    }
    report = [f"{title}:\n    " + "\n    ".join(paths) for title, paths in problems.items() if paths]
    assert not report, "\n".join(report)


def test_parse_tree_joins_levels() -> None:
    markdown = """
```
layerskip/
    src/layerskip/      the package
        model/          the network
            cache.py    keys and values
        errors.py
    Makefile            targets
```
"""
    assert parse_tree(tree_block(markdown)) == [
        "src/layerskip/",
        "src/layerskip/model/",
        "src/layerskip/model/cache.py",
        "src/layerskip/errors.py",
        "Makefile",
    ]


@pytest.mark.parametrize("line", ["  docs/", "        too_deep.py", "not_indented.py", "    one space", "├── docs/"])
def test_parse_tree_refuses_other_formats(line: str) -> None:
    with pytest.raises(AssertionError, match="indented"):
        parse_tree([line])


def test_walk_agrees_with_git(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text(".venv/\n*.egg-info/\nbenchmarks/results/\n")
    for name in ["a.py", "docs/b.md", ".venv/c", "x.egg-info/d", "benchmarks/results/e", "benchmarks/f.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    expected = [".gitignore", "a.py", "benchmarks/f.py", "docs/b.md"]
    assert sorted(walk(tmp_path)) == expected
    if shutil.which("git"):
        subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
        assert sorted(files_on_disk(tmp_path)) == expected
