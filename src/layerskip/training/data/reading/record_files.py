"""Files that hold records: JSON, JSON lines, CSV, Parquet, Arrow."""

import csv
import json
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from layerskip.errors import InvalidArgumentError
from layerskip.training.data.reading.conversations import without_nulls

JSON_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson"})
RECORD_SUFFIXES = JSON_SUFFIXES | {".csv", ".tsv", ".parquet", ".arrow"}
DELIMITERS = ",;\t"
ROWS_AT_ONCE = 256

Record = tuple[object, str]
"""A record, and its place for error messages: the file with its line or number."""


def read_records(path: Path) -> Iterator[Record]:
    """Records of a file, in order, each with its name in error messages.

    The suffix tells JSON, text with columns and tables apart. Whether JSON is one array, one object, or an object in
    each line depends on its content.

    Args:
        path: A file with one of `RECORD_SUFFIXES`.

    Raises:
        InvalidArgumentError: The file can't be read as its suffix says; the message names the line or row.
    """
    suffix = path.suffix.lower()
    if suffix in JSON_SUFFIXES:
        yield from _read_json(path)
    elif suffix in (".csv", ".tsv"):
        yield from _read_columns(path)
    else:
        yield from _read_table(path)


def _read_json(path: Path) -> Iterator[Record]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            number, first = next(((n, line) for n, line in enumerate(file, 1) if line.strip()), (0, ""))
            if first.lstrip().startswith("[") or (first and not _is_json(first)):
                whole = _read_whole(path, first, file, f"{path}, line {number}")
                records = whole if isinstance(whole, list) else [whole]
                yield from ((record, f"{path}, record {index}") for index, record in enumerate(records, 1))
                return
            for index, line in enumerate(chain([first], file), number):
                if line.strip():
                    yield _parse(line, f"{path}, line {index}"), f"{path}, line {index}"
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"{path} can't be read as UTF-8 JSON: {error}") from error


def _read_whole(path: Path, first: str, file: IO[str], line: str) -> object:
    """One JSON value over several lines; in a file named as JSON lines, errors name lines instead."""
    text = first + file.read()
    if path.suffix.lower() != ".json" and not _is_json(text):
        _parse(first, line)
        raise InvalidArgumentError(f"{path} must be a JSON object in each line, or one array of them; correct it")
    return _parse(text, str(path))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parse(text: str, origin: str) -> object:
    try:
        record: object = json.loads(text)
        if "\\u" in text:  # JSON can contain half a surrogate pair, which no later step accepts as text
            json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{origin} is not JSON in UTF-8: {error}; correct or remove it") from error
    return record


def _read_columns(path: Path) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # a field may be a whole book
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            # Spreadsheets of many countries separate by semicolons.
            delimiter = "\t" if path.suffix.lower() == ".tsv" else max(DELIMITERS, key=header.count)
            rows = csv.reader(chain([header], file), delimiter=delimiter, strict=True)
            names = next(rows, [])
            if len(set(names)) < len(names):
                raise InvalidArgumentError(f"{path} has two columns of one name in {header.strip()!r:.200}")
            for number, row in enumerate(rows, 1):
                if not row:
                    continue
                if len(row) != len(names):
                    raise InvalidArgumentError(
                        f"{path}, row {number} has {len(row)} fields, and the header names {len(names)}; correct it, "
                        "or put fields that hold separators into quotes"
                    )
                yield dict(zip(names, row, strict=True)), f"{path}, row {number}"
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidArgumentError(f"{path} can't be read as UTF-8 text with columns: {error}") from error


def _read_table(path: Path) -> Iterator[Record]:
    try:
        import pyarrow
    except ImportError as error:
        raise InvalidArgumentError(f"{path} needs the package pyarrow: pip install 'layerskip[train]'") from error
    try:
        number = 0
        for batch in _parquet(path) if path.suffix.lower() == ".parquet" else _arrow(path):
            for record in batch.to_pylist():
                number += 1
                yield without_nulls(record), f"{path}, row {number}"
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        kind = path.suffix.lower().removeprefix(".")
        raise InvalidArgumentError(f"{path} can't be read as a {kind} file: {' '.join(str(error).split())}") from error


def _parquet(path: Path) -> Iterator[Any]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=ROWS_AT_ONCE)


def _arrow(path: Path) -> Iterator[Any]:
    """Batches of an Arrow file; `datasets` writes a stream, other programs a file with an index at the end."""
    import pyarrow

    with pyarrow.OSFile(str(path)) as file:
        try:
            yield from pyarrow.ipc.open_stream(file)
            return
        except pyarrow.ArrowInvalid:
            file.seek(0)
        reader = pyarrow.ipc.open_file(file)
        yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
