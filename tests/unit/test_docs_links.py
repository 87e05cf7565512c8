"""Links in README.md, CONTRIBUTING.md, CHANGELOG.md and docs/ lead somewhere, and the files that they name exist.

Checked are relative links with their anchors, paths in backticks, and the folder tree in docs/architecture.md.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "layerskip"
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted(ROOT.glob("docs/*.md"))]
FILE = r"[\w./-]+\.(?:py|cpp|h|md|toml|svg|png)"
WRITTEN_BY_RUNS = {"training.toml", "agreement.png"}
"""Files that commands write, which the pages name too."""


def without_code_blocks(markdown: str) -> str:
    return re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)


def anchors(markdown: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ +(.*)$", without_code_blocks(markdown), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code_blocks(page.read_text("utf-8"))):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = page.parent / path if path else page
        if not file.exists():
            yield f"{target}: there is no such file"
        elif anchor and anchor not in anchors(file.read_text("utf-8")):
            yield f"{target}: the page has no such heading"


def files_named(markdown: str) -> set[str]:
    """Paths of files in backticks."""
    return set(re.findall(rf"`({FILE})`", without_code_blocks(markdown)))


def exists(name: str) -> bool:
    """Whether a file exists, seen from the root, from the package, or, given by its name only, anywhere below them."""
    if (ROOT / name).exists() or (PACKAGE / name).exists():
        return True
    folders = [PACKAGE, *(ROOT / folder for folder in ("native", "docs", "benchmarks", "tests"))]
    return "/" not in name and any(any(folder.rglob(name)) for folder in folders)


def answers(markdown: str) -> Iterator[tuple[Path, str]]:
    """Files and functions of the table of questions: `folder` in one cell, `file.py`: `function`, ... in the next."""
    for folder, cell in re.findall(r"^\| [^|]+\? \| `([\w/]+/)` \| (.*) \|$", markdown, re.MULTILINE):
        file: Path | None = None
        for name in re.findall(r"`([\w./]+)`", cell):
            if re.fullmatch(FILE, name):
                file = next(path for path in (PACKAGE / folder / name, PACKAGE / name, ROOT / name) if path.exists())
            elif file is not None:
                yield file, name


def is_defined(file: Path, name: str) -> bool:
    """Whether a file defines a function, a class, or a method given as Class.method."""
    words = [rf"\b(?:def|class|void) {part}\b" for part in name.split(".")]
    return all(re.search(word, file.read_text("utf-8")) for word in words)


def tree_entries(markdown: str) -> dict[str, str]:
    """Folders of the fenced tree that begins with `src/layerskip/`: path -> comment."""
    block = re.search(r"^```\nsrc/layerskip/\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)
    assert block, "docs/architecture.md has no fenced block that begins with the line `src/layerskip/`"
    entries, parent = {}, ""
    for line in block[1].splitlines():
        entry = re.fullmatch(r"( {4}| {8})([\w/]+/) {2,}(\S.*)", line)
        assert entry, f"not `name/  comment`, indented by 4 or 8 spaces: {line!r}"
        parent = entry[2] if len(entry[1]) == 4 else parent
        entries[entry[2] if len(entry[1]) == 4 else parent + entry[2]] = entry[3]
    return entries


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert list(broken_links(page)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    names = files_named(page.read_text("utf-8")) - WRITTEN_BY_RUNS
    assert sorted(name for name in names if not exists(name)) == []


def test_functions_that_answer_questions_exist() -> None:
    pairs = list(answers((ROOT / "docs" / "architecture.md").read_text("utf-8")))
    assert len(pairs) > 10
    missing = {name for file, name in pairs if not is_defined(file, name)}
    assert missing == set()


def test_the_tree_of_folders_is_true() -> None:
    listed = set(tree_entries((ROOT / "docs" / "architecture.md").read_text("utf-8")))
    folders = {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*/__init__.py")} - {"."}
    expected = {f"{folder}/" for folder in folders if folder.count("/") < 2}
    assert sorted(listed - {"assets/demo/", "assets/smollm2/"}) == sorted(expected)


def test_native_files_are_described() -> None:
    page = (ROOT / "docs" / "native.md").read_text("utf-8")
    sources = sorted((ROOT / "native").rglob("*.cpp"))
    assert [path.name for path in sources if f"`{path.name}`" not in page] == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `heading`, and more\n[a](#a-heading-and-more) [b](#b) [c](other.md) [d](https://e.org/f#g)\n")
    assert list(broken_links(page)) == [
        "#b: the page has no such heading",
        "other.md: there is no such file",
    ]


def test_files_are_found_by_path_and_by_name() -> None:
    assert files_named("`docs/x.md`, `a.py`, `a.py: f`, `run`\n```\n`b.py`\n```") == {"docs/x.md", "a.py"}
    assert exists("model/cache.py")
    assert exists("native/pass.cpp")
    assert exists("families.py")
    assert not exists("model/families.py")
