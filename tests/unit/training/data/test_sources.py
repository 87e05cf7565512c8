"""Every kind of source, what it leaves out, and its errors."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from layerskip.errors import InvalidArgumentError
from layerskip.training.data.config import DataConfig
from layerskip.training.data.reading import sources
from layerskip.training.data.reading.documents import ChatDocument, CompletionDocument, Document, TextDocument
from layerskip.training.data.reading.sources import read_documents

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def read(*data: str, **options: Any) -> list[Document]:
    return list(read_documents(DataConfig(data=data, **options)))


def texts(*data: str, **options: Any) -> list[str]:
    return [document.plain_text for document in read(*data, **options)]


@pytest.fixture
def stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "lib"
    for name in [
        "os.py", "json/decoder.py", "notes.txt", "test/test_os.py", "ctypes/tests/a.py", "idlelib/run.py",
        "site-packages/six.py", "dist-packages/seven.py", "lib2to3/tests/data/bom.py", "__pycache__/x.py",
    ]:  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"# {name}\n")
    (folder / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(folder)})
    return folder


def test_stdlib_leaves_out_tests_packages_and_other_encodings(stdlib: Path) -> None:
    assert texts("python-stdlib") == ["# os.py\n", "# json/decoder.py\n"]
    assert read("python-stdlib")[1].origin == "python-stdlib/json/decoder.py"


def test_stdlib_all_has_the_tests_too(stdlib: Path) -> None:
    found = {text.removeprefix("# ").strip() for text in texts("python-stdlib:all")}
    assert found == {"os.py", "json/decoder.py", "test/test_os.py", "ctypes/tests/a.py", "idlelib/run.py"}


def test_this_interpreter_has_a_stdlib() -> None:
    found = texts("python-stdlib", max_documents=30)
    assert len(found) == 30
    assert any("import" in text for text in found)


def test_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert read(str(tmp_path / "a.xyz")) == [TextDocument(origin=str(tmp_path / "a.xyz"), text="one\ntwo\n")]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a\0b"])
def test_a_named_file_that_is_no_text_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(InvalidArgumentError, match=r"a\.bin is not a UTF-8 text file"):
        read(str(tmp_path / "a.bin"))


def test_folder_is_read_in_order_of_paths_without_what_is_no_source(tmp_path: Path) -> None:
    for name in [
        "b.py", "a.md", "C.PY", "z/a.rs", "z/b/c.c", "data.json", "list.jsonl", "noise.png", ".hidden/a.py",
        ".env.py/a.py", "__pycache__/a.py", "node_modules/a.js", ".git/a.py",
    ]:  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{name}\n")
    (tmp_path / "empty.py").write_text(" \n")
    (tmp_path / "latin.py").write_bytes(b"\xe9")
    (tmp_path / "binary.py").write_bytes(b"a\0")
    (tmp_path / "broken.py").symlink_to(tmp_path / "nowhere")
    assert texts(str(tmp_path)) == ["C.PY\n", "a.md\n", "b.py\n", "z/a.rs\n", "z/b/c.c\n"]
    assert texts(str(tmp_path), suffixes=(".py", "c")) == ["C.PY\n", "b.py\n", "z/b/c.c\n"]


def test_order_does_not_depend_on_the_file_system(many_texts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (Path(many_texts) / "b").mkdir()
    (Path(many_texts) / "a").mkdir()
    for name in ("b/1.txt", "a/2.txt"):
        (Path(many_texts) / name).write_text(name)
    expected = texts(many_texts)
    walk = os.walk

    def reversed_walk(folder: Path) -> Iterator[Any]:
        for parent, folders, names in walk(folder):
            folders.sort(reverse=True)
            yield parent, folders, sorted(names, reverse=True)

    monkeypatch.setattr(os, "walk", reversed_walk)
    assert texts(many_texts) == expected
    assert expected[-2:] == ["a/2.txt", "b/1.txt"]


def test_folder_reads_records_where_they_are_asked_for(tmp_path: Path, write_jsonl: Any) -> None:
    write_jsonl({"text": "a"}, {"text": "b"})
    assert texts(str(tmp_path), suffixes=(".jsonl",)) == ["a", "b"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("a")
    (tmp_path / "a.py").chmod(0)
    with pytest.raises(InvalidArgumentError, match=r"a\.py can't be read"):
        read(str(tmp_path))


def test_shapes_of_records(write_jsonl: Any) -> None:
    path = write_jsonl(
        {"text": "a", "id": 1},
        {"content": "b"},
        {"prompt": "1+1=", "completion": "2", "text": None},
        {"question": "2+2?", "answer": "4"},
        {"messages": CHAT},
    )
    assert read(path) == [
        TextDocument(origin=f"{path}, line 1", text="a"),
        TextDocument(origin=f"{path}, line 2", text="b"),
        CompletionDocument(origin=f"{path}, line 3, prompt", prompt="1+1=", completion="2"),
        CompletionDocument(origin=f"{path}, line 4, question", prompt="2+2?", completion="\n4"),
        ChatDocument(origin=f"{path}, line 5, messages", messages=tuple(CHAT)),
    ]


def test_named_field_wins_and_may_hold_messages(write_jsonl: Any) -> None:
    assert texts(write_jsonl({"text": "a", "code": "b"}), text_field="code") == ["b"]
    (chat,) = read(write_jsonl({"text": "a", "conversation": CHAT}), text_field="conversation")
    assert isinstance(chat, ChatDocument)


def test_prompt_and_completion_as_messages_are_one_conversation(write_jsonl: Any) -> None:
    (chat,) = read(write_jsonl({"prompt": CHAT[:1], "completion": CHAT[1:]}))
    assert isinstance(chat, ChatDocument)
    assert list(chat.messages) == CHAT


def test_messages_keep_what_templates_may_know(write_jsonl: Any) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}], "name": None}
    (chat,) = read(write_jsonl({"messages": [CHAT[0], call]}))
    assert isinstance(chat, ChatDocument)
    assert chat.messages[1] == {"role": "assistant", "tool_calls": [{"name": "add"}]}


def test_records_with_nothing_to_learn_are_left_out(tmp_path: Path, write_jsonl: Any) -> None:
    path = write_jsonl({"text": " \n"}, {"prompt": "a", "completion": ""}, {"messages": CHAT[:1]}, {"text": "b"})
    (tmp_path / "data.jsonl").write_text("\n" + Path(path).read_text())
    assert texts(path) == ["b"]
    assert read(path)[0].origin.endswith("line 5")


@pytest.mark.parametrize(
    ("line", "options", "message"),
    [
        ("{broken", {}, r"data\.jsonl, line 2 is not JSON"),
        ("[1]", {}, "line 2 must be a JSON object with fields, got a list"),
        ('{"a": 1, "b": 2}', {}, r"line 2 has the fields 'a', 'b', and none of messages, .*text_field"),
        ("{}", {}, "line 2 has no fields"),
        ('{"prompt": "x"}', {}, "line 2 has the fields 'prompt', and none of"),
        ('{"text": "x"}', {"text_field": "code"}, "line 1 has no field 'code'; it has the fields 'text'"),
        ('{"text": 3}', {}, "line 2: field 'text' must be a text or a list of messages, got 3"),
        (
            '{"prompt": "x", "completion": 3}',
            {},
            "line 2, prompt: prompt and completion must be texts, got str and int",
        ),
        ('{"messages": "x"}', {}, "line 2, messages must be a list of messages"),
        ('{"messages": [{"content": "x"}]}', {}, r"line 2, messages\[0\] must be a message such as"),
        ('{"messages": [{"role": "user"}]}', {}, r"messages\[0\] must be a message"),
        ('{"messages": ["x"]}', {}, r"messages\[0\] must be a message"),
        (r'{"text": "\ud800"}', {}, "line 2 is not JSON in UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, options: dict[str, Any], message: str) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(InvalidArgumentError, match=message):
        read(str(tmp_path / "data.jsonl"), **options)


def test_jsonl_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(InvalidArgumentError, match=r"data\.jsonl can't be read as UTF-8"):
        read(str(tmp_path / "data.jsonl"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nothing", "there is no file or folder './nothing'; data can be python-stdlib"),
        ("folder/data.jsonl", "there is no file or folder 'folder/data.jsonl'"),
        ("notes.txt", "there is no file or folder 'notes.txt'"),
        ("imdb", "data 'imdb' is not known; data can be python-stdlib.*hub"),
        ("a b/c", "there is no file or folder 'a b/c'"),
    ],
)
def test_unknown_sources_are_reported_before_anything_is_read(source: str, message: str, many_texts: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        read_documents(DataConfig(data=(many_texts, source)))  # not even iterated


def test_no_source() -> None:
    with pytest.raises(InvalidArgumentError, match="no data was named; data can be python-stdlib"):
        read_documents(DataConfig())


def test_the_same_content_comes_once(tmp_path: Path, write_jsonl: Any) -> None:
    for name, text in {"a.py": "x = 1\ny = 2\n", "b.py": "x = 1  \ny = 2", "c.py": "x = 1\n\ny = 2\n"}.items():
        (tmp_path / name).write_text(text)
    path = write_jsonl({"text": "x = 1\ny = 2"}, {"prompt": "x", "completion": "y"}, {"prompt": "x", "completion": "y"})
    assert [document.origin for document in read(str(tmp_path), path)] == [
        str(tmp_path / "a.py"), str(tmp_path / "c.py"), f"{path}, line 2, prompt",
    ]  # fmt: skip


def test_most_documents(many_texts: str, write_jsonl: Any) -> None:
    path = write_jsonl({"text": "another"})
    assert len(read(many_texts, path, max_documents=60)) == 60
    assert len(read(many_texts, path, max_documents=61)) == 61
    assert texts(path, many_texts, max_documents=1) == ["another"]


class Hub:
    """In place of the hub: what was asked for, and a data set of two records."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def load_dataset(self, name: str, configuration: str | None, *, split: str, streaming: bool) -> Any:
        from datasets import Dataset

        self.asked.append((name, configuration, split, streaming))
        if "missing" in name:
            raise ConnectionError("Couldn't reach it\nand more")
        dataset = Dataset.from_list([{"text": "a", "other": None}, {"text": "b", "other": None}])
        return dataset.to_iterable_dataset() if streaming else dataset


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr("datasets.load_dataset", hub.load_dataset)
    return hub


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("owner/stories", ("owner/stories", None, "train")),
        ("owner/stories:validation", ("owner/stories", None, "validation")),
        ("owner/stories/en-v1.0:train[:5%]", ("owner/stories", "en-v1.0", "train[:5%]")),
        ("owner/stories/main", ("owner/stories", "main", "train")),
    ],
)
def test_data_sets_of_the_hub(hub: Hub, source: str, asked: tuple[Any, ...], streaming: bool) -> None:
    documents = read(source, streaming=streaming)
    assert [document.plain_text for document in documents] == ["a", "b"]
    assert documents[1].origin == f"owner/stories:{asked[2]}, record 2"
    assert hub.asked == [(*asked, streaming)]


def test_a_folder_wins_over_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "stories").mkdir(parents=True)
    (tmp_path / "owner" / "stories" / "a.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert texts("owner/stories") == ["mine"]
    assert hub.asked == []


def test_errors_of_the_hub_say_what_to_check(hub: Hub) -> None:
    message = r"data set 'owner/missing' \(configuration default, split train\) can't be read.*reach it; check"
    with pytest.raises(InvalidArgumentError, match=message):
        read("owner/missing")


def test_errors_of_a_record_of_the_hub_name_it(hub: Hub) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^owner/stories:train, record 1 has no field 'code'"):
        read("owner/stories", text_field="code")


def test_without_the_package_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InvalidArgumentError, match=r"needs the package datasets: pip install 'layerskip\[train\]'"):
        read("owner/stories")


def test_sources_are_read_lazily(monkeypatch: pytest.MonkeyPatch, many_texts: str) -> None:
    num_read = 0
    read_folder = sources.read_folder

    def counted(*args: Any) -> Iterator[Document]:
        nonlocal num_read
        for document in read_folder(*args):
            num_read += 1
            yield document

    monkeypatch.setattr(sources, "read_folder", counted)
    next(read_documents(DataConfig(data=(many_texts,))))
    assert num_read == 1
