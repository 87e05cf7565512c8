"""Documents of the named sources, in a fixed order and without duplicates."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from layerskip.errors import InvalidArgumentError
from layerskip.training.data.config import DataConfig
from layerskip.training.data.reading.conversations import without_nulls
from layerskip.training.data.reading.documents import Document
from layerskip.training.data.reading.files import STDLIB, SUFFIXES, read_file, read_folder, read_stdlib
from layerskip.training.data.reading.record_files import RECORD_SUFFIXES
from layerskip.training.data.reading.records import read_record

Reader = Callable[[], Iterator[Document]]
KINDS = (
    f"{STDLIB}, {STDLIB}:all, a text file, a file of records (.jsonl, .json, .csv, .parquet), a folder, or a data set "
    "of the Hugging Face hub (owner/name, owner/name:split, owner/name/config:split)"
)
HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.\[\]%:+-]+))?")
DATA_SUFFIXES = RECORD_SUFFIXES | {".gz", ".zip"}


def read_documents(config: DataConfig) -> Iterator[Document]:
    """Documents of all sources, in the order of the sources and of file paths; duplicates are left out.

    Args:
        config: The sources, and how to read them.

    Raises:
        InvalidArgumentError: No source or an unknown one (at once), or a source that can't be read (while reading).
    """
    if not config.data:
        raise InvalidArgumentError(f"no data was named; data can be {KINDS}")
    return _distinct([open_source(spec, config) for spec in config.data], config.max_documents)


def open_source(spec: str, config: DataConfig) -> Reader:
    """A function that reads the documents of one source from the start.

    Raises:
        InvalidArgumentError: There is no such source.
    """
    if spec in (STDLIB, f"{STDLIB}:all"):
        return lambda: read_stdlib(with_tests=spec != STDLIB)
    path = Path(spec).expanduser()
    if path.is_file():
        return lambda: read_file(path, config.text_field)
    if path.is_dir():
        return lambda: read_folder(path, config.suffixes, config.text_field)
    match = HUB_NAME.fullmatch(spec)
    if match is None or path.suffix.lower() in SUFFIXES | DATA_SUFFIXES:
        looks_like_path = "/" in spec or "\\" in spec or path.suffix
        what = f"there is no file or folder {spec!r}" if looks_like_path else f"data {spec!r} is not known"
        raise InvalidArgumentError(f"{what}; data can be {KINDS}")
    name, configuration, split = match["name"], match["config"], match["split"] or "train"
    return lambda: _read_hub(name, configuration, split, config)


def _distinct(readers: list[Reader], limit: int | None) -> Iterator[Document]:
    # Duplicates are found over the whole corpus, so that nothing held out is learned from a second copy.
    seen: set[int] = set()
    for reader in readers:
        for document in reader():
            if document.content_hash in seen:
                continue
            seen.add(document.content_hash)
            yield document
            if len(seen) == limit:
                return


def _read_hub(name: str, configuration: str | None, split: str, config: DataConfig) -> Iterator[Document]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InvalidArgumentError(
            f"data set {name} needs the package datasets: pip install 'layerskip[train]'"
        ) from error
    try:
        dataset = load_dataset(name, configuration, split=split, streaming=config.streaming)
        for number, record in enumerate(dataset, 1):
            yield from read_record(without_nulls(record), config.text_field, f"{name}:{split}, record {number}")
    except InvalidArgumentError:
        raise
    except Exception as error:  # datasets raises nearly anything here, from ValueError to those of its HTTP library
        raise InvalidArgumentError(
            f"data set {name!r} (configuration {configuration or 'default'}, split {split}) can't be read, and there "
            f"is no file or folder of this name either: {_first_line(error)}; check name, configuration and split at "
            f"https://huggingface.co/datasets/{name}, and log in with `hf auth login` if it is gated or private"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
