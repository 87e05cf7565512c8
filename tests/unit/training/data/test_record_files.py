"""Files of records of every kind, and the shapes of records that data sets have."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from layerskip.errors import InvalidArgumentError
from layerskip.training.data.config import DataConfig
from layerskip.training.data.reading.documents import ChatDocument, CompletionDocument, Document, InstructionDocument
from layerskip.training.data.reading.sources import read_documents

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CHAT = {"messages": [USER, ASSISTANT]}
RECORDS: list[dict[str, Any]] = [{"text": 'one, "two"\nthree'}, {"text": "four; é"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}}
OTHER = {"type": "function", "function": {"name": "sleep", "parameters": {"properties": {"b": {"type": "number"}}}}}


def read(path: Path, **options: Any) -> list[Document]:
    return list(read_documents(DataConfig(data=(str(path),), **options)))


def read_one(path: Path, record: Any) -> Document:
    path.write_text(json.dumps([record]))
    (document,) = read(path)
    return document


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    import pyarrow
    from datasets import Dataset
    from pyarrow import parquet

    match path.name.partition(".")[2]:
        case "json":
            path.write_text(json.dumps(records, indent=2))
        case "lines.json" | "jsonl" | "ndjson":
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        case "array.jsonl":
            path.write_text("\n " + json.dumps(records))
        case "csv" | "tsv" | "semicolon.csv" as kind:
            with path.open("w", encoding="utf-8-sig", newline="") as file:
                delimiter = {"csv": ",", "tsv": "\t"}.get(kind, ";")
                rows = csv.DictWriter(file, ["id", *records[0]], delimiter=delimiter)
                rows.writeheader()
                rows.writerows({"id": index, **record} for index, record in enumerate(records))
        case "parquet":
            parquet.write_table(pyarrow.Table.from_pylist(records), path)
        case "arrow":
            table = pyarrow.Table.from_pylist(records)
            with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
        case "stream.arrow":
            folder = path.parent / "saved"
            Dataset.from_list(records).save_to_disk(str(folder))
            (folder / "data-00000-of-00001.arrow").rename(path)


KINDS = [
    "a.json", "a.lines.json", "a.jsonl", "a.ndjson", "a.array.jsonl", "a.csv", "a.tsv", "a.semicolon.csv", "a.parquet",
    "a.arrow", "a.stream.arrow", "A.JSON",
]  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_files_of_records(tmp_path: Path, name: str) -> None:
    path = tmp_path / name.lower()
    write_records(path, RECORDS)
    path = path.rename(tmp_path / name)
    documents = read(path)
    assert [document.plain_text for document in documents] == [record["text"] for record in RECORDS]
    assert [document.origin.removeprefix(str(path))[:3] for document in documents] in ([", l"] * 2, [", r"] * 2)
    suffix = "." + name.rpartition(".")[2].lower()
    (tmp_path / "a.txt").write_text("not this")
    assert [d.plain_text for d in read(tmp_path, suffixes=(suffix,))] == [record["text"] for record in RECORDS]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet", "a.arrow"])
def test_conversations_in_files(tmp_path: Path, name: str) -> None:
    write_records(tmp_path / name, [{**CHAT, "tools": [TOOL]}, {"messages": [USER, ASSISTANT] * 2, "tools": [OTHER]}])
    first, second = read(tmp_path / name)
    assert isinstance(first, ChatDocument)
    assert isinstance(second, ChatDocument)
    assert first.messages == (USER, ASSISTANT)
    # In a table, each tool has the other's parameters, without a value.
    assert (first.tools, second.tools) == ((TOOL,), (OTHER,))
    assert first.content_hash != ChatDocument(origin="", messages=first.messages).content_hash


def test_one_object(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"text": "alone"}, indent=2))
    assert [document.plain_text for document in read(tmp_path / "a.json")] == ["alone"]


def test_a_conversation_in_a_column(tmp_path: Path) -> None:
    write_records(tmp_path / "a.csv", [{"messages": json.dumps(CHAT["messages"]), "tools": json.dumps([TOOL])}])
    (chat,) = read(tmp_path / "a.csv")
    assert isinstance(chat, ChatDocument)
    assert (chat.messages, chat.tools) == ((USER, ASSISTANT), (TOOL,))


def test_long_fields(tmp_path: Path) -> None:
    write_records(tmp_path / "a.csv", [{"text": "long " * 100_000}])
    assert len(read(tmp_path / "a.csv")[0].plain_text) == 500_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[1, 2]", r"a\.json, record 1 must be a JSON object with fields, got a int"),
        ("a.json", b'{"data": [{"text": "a"}]}', r"a\.json, line 1 has the fields 'data', and none of messages"),
        ("a.json", b'[{"text": "a"}', r"a\.json is not JSON in UTF-8: .*; correct or remove it"),
        ("a.json", b'"text"', r"must be a JSON object with fields, got a str"),
        ("a.json", b"[" * 100_000, r"a\.json is not JSON"),
        ("a.json", b'\xff\xfe{"text"', r"a\.json can't be read as UTF-8 JSON"),
        ("a.jsonl", b'[{"role": "user"}]\n[{"role": "user"}]\n', "must be a JSON object in each line, or one array"),
        ("a.jsonl", b'{"text": \n', "line 1 is not JSON in UTF-8"),
        ("a.csv", b"text,b\nx\n", r"a\.csv, row 1 has 1 fields, and the header names 2"),
        ("a.csv", b"text,text\nx,y\n", "has two columns of one name in 'text,text'"),
        ("a.csv", b"title,body\nx,y\n", r"row 1 has the fields 'title', 'body', and none of"),
        ("a.csv", b'text\n"x\n', r"a\.csv can't be read as UTF-8 text with columns: unexpected end"),
        ("a.csv", "text\nx\n".encode("utf-16"), r"a\.csv can't be read as UTF-8 text with columns"),
        ("a.parquet", b"PAR1 not really", r"a\.parquet can't be read as a parquet file"),
        ("a.parquet", b"", r"a\.parquet can't be read as a parquet file"),
        ("a.arrow", b"nothing", r"a\.arrow can't be read as a arrow file"),
        ("a.ipynb", b'{"cells": []}', r"a\.ipynb holds JSON, and would be learned with all its braces; call it \.json"),
        ("a.data", b'{"text": "a"}\n{"text": "b"}\n', r"a\.data holds JSON"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_as_records_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_table_that_is_cut(tmp_path: Path) -> None:
    write_records(tmp_path / "a.parquet", RECORDS)
    content = (tmp_path / "a.parquet").read_bytes()
    for size in (4, len(content) // 2, len(content) - 1):
        (tmp_path / "a.parquet").write_bytes(content[:size])
        with pytest.raises(InvalidArgumentError, match=r"a\.parquet can't be read as a parquet file"):
            read(tmp_path / "a.parquet")


def test_a_folder_that_has_records_only(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.csv", "c.csv", "d.png"):
        (tmp_path / name).write_text("x")
    with pytest.raises(InvalidArgumentError, match=r"files of records \(2 \.csv, 1 \.jsonl\); read them with suffixes"):
        read(tmp_path)


def test_text_that_looks_like_json_stays_text(tmp_path: Path) -> None:
    for name, text in {"a.txt": "[1, 2]", "a.py": "[1, 2]", "a.data": "[1, 2"}.items():
        (tmp_path / name).write_text(text)
        assert [document.plain_text for document in read(tmp_path / name)] == [text]


# Shapes of records


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"conversations": [USER, ASSISTANT], "id": "7"},
        {"conversations": [{"from": "user", "value": "Hi"}, {"from": "chatgpt", "value": "Hello"}], "text": "all"},
        {"messages": [{**USER, "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, ASSISTANT]},
        {"prompt": [USER], "completion": [{**ASSISTANT, "content": [{"type": "text", "text": "Hello"}]}]},
        {"messages": [USER, ASSISTANT], "prompt": "Hi"},
    ],
)  # fmt: skip
def test_conversations_are_read_as_what_they_are(tmp_path: Path, record: dict[str, Any]) -> None:
    chat = read_one(tmp_path / "a.json", record)
    assert isinstance(chat, ChatDocument)
    assert chat.messages == (USER, ASSISTANT)


def test_sharegpt_with_a_system_message_and_tools(tmp_path: Path) -> None:
    chat = read_one(
        tmp_path / "a.json",
        {
            "system": "Be brief.",
            "tools": json.dumps([{"name": "add"}]),
            "conversations": [
                {"from": "human", "value": "1+1?"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "Two."},
            ],
        },
    )
    assert isinstance(chat, ChatDocument)
    assert chat.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two."},
    )
    assert chat.tools == ({"name": "add"},)


def test_alpaca_and_dolly(tmp_path: Path) -> None:
    for record in (
        {"instruction": "Add.", "input": "1 and 1", "output": "2", "text": "Below is an instruction ..."},
        {"instruction": "Add.", "context": "1 and 1", "response": "2", "category": "closed_qa"},
    ):
        task = read_one(tmp_path / "a.json", record)
        assert isinstance(task, InstructionDocument)
        assert (task.instruction, task.input, task.output) == ("Add.", "1 and 1", "2")
    task = read_one(tmp_path / "a.json", {"instruction": "Say two.", "output": "2"})
    assert isinstance(task, InstructionDocument)
    assert task.conversation.messages[0] == {"role": "user", "content": "Say two."}
    assert "### Input" not in task.plain_text
    chat = read_one(
        tmp_path / "a.json",
        {"instruction": "And 2?", "input": "", "output": "4", "system": "Add.", "history": [["1+1?", "2"]]},
    )
    assert isinstance(chat, ChatDocument)
    assert [message["content"] for message in chat.messages] == ["Add.", "1+1?", "2", "And 2?", "4"]


def test_results_of_batch_are_the_models_own_answers(tmp_path: Path) -> None:
    """What `layerskip batch` writes is data to distil a model from itself; lines that failed teach nothing."""
    rest = {"token_ids": [1, 2], "finish_reason": "stop", "seed": 0, "stats": {}}
    chat = read_one(tmp_path / "a.json", {"index": 0, "prompt": [USER], "text": "Two.", **rest})
    assert isinstance(chat, ChatDocument)
    assert chat.messages == (USER, {"role": "assistant", "content": "Two."})
    pair = read_one(tmp_path / "a.json", {"index": 0, "prompt": "1, 2,", "text": " 3", **rest})
    assert isinstance(pair, CompletionDocument)
    assert (pair.prompt, pair.completion) == ("1, 2,", " 3")
    records = [
        {"index": 0, "prompt": [USER], "error": "too long"},
        {"index": 1, "prompt": [USER], "text": "Two.", **rest},
    ]
    (tmp_path / "b.json").write_text(json.dumps(records))
    assert len(list(read(tmp_path / "b.json"))) == 1


def test_arguments_of_calls_are_objects(tmp_path: Path) -> None:
    """OpenAI spells them as JSON; a template would put that text into quotes."""
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    asked = {"role": "assistant", "content": None, "tool_calls": [call]}
    chat = read_one(tmp_path / "a.json", {"messages": [USER, asked], "functions": [{"name": "add"}]})
    assert isinstance(chat, ChatDocument)
    assert chat.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert chat.tools == ({"type": "function", "function": {"name": "add"}},)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": [{"from": "narrator", "value": "x"}]}, r"conversations\[0\] .*said by one of system, human"),
        ({"conversations": [{"from": "human", "value": 3}]}, r"conversations\[0\] must be a message"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            r"messages\[0\] has content of the type 'image_url', and only text can be learned",
        ),
        ({**CHAT, "tools": "add"}, "tools must be a list of JSON schemas of functions, got 'add'"),
        ({"instruction": "x", "output": 3}, "field 'output' must be a text, got 3"),
        ({"instruction": "x", "output": "y", "history": ["z"]}, "history must be a list of questions"),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, "has the fields 'prompt', 'chosen', 'rejected', and none"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": ["add"]}]},
            r"messages\[1\] must call tools such as",
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "a", "arguments": "{"}]}]},
            "arguments must be JSON",
        ),
    ],
)
def test_records_of_no_known_shape(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        read_one(tmp_path / "a.json", record)
