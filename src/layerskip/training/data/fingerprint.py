"""Fingerprints of a run's data: a run is not resumed with other data."""

import json
from collections.abc import Mapping
from hashlib import blake2b
from itertools import islice
from pathlib import Path

from layerskip.errors import CheckpointError, InvalidArgumentError, brief
from layerskip.files import parse_json, write_atomically
from layerskip.training.data.config import DataConfig
from layerskip.training.data.reading.documents import HASH_BYTES
from layerskip.training.data.reading.files import folder_files
from layerskip.training.data.reading.sources import open_source

DATA_FILE = "data.json"
STREAMED = 256
"""Documents of a stream that are hashed; for files, their number and bytes are compared as well."""

Fingerprint = Mapping[str, str | int]


def fingerprints(config: DataConfig) -> dict[str, Fingerprint]:
    """The fingerprint of each source, from all of its documents; with streaming, from the first ones."""
    return {spec: _fingerprint(spec, config) for spec in config.data}


def check_data(output: Path, config: DataConfig, *, resume: bool) -> None:
    """Save the fingerprints of the data, or compare them with the ones saved when the run began.

    Args:
        output: The run's folder.
        config: Which data.
        resume: Whether the run is resumed. A run begun by an earlier version of this package has no fingerprints to
            compare.

    Raises:
        InvalidArgumentError: The data has changed; the message names the source and the difference.
        CheckpointError: The file can't be read or written.
    """
    file, now = output / DATA_FILE, fingerprints(config)
    try:
        if not (resume and file.is_file()):
            write_atomically(file, json.dumps(now, indent=2) + "\n")
            return
        before = parse_json(file.read_text("utf-8"))
        changed = [_difference(spec, before[spec], now[spec]) for spec in now if before[spec] != now[spec]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} can't be used ({brief(error)}); delete it to go on without comparing the data"
        ) from error
    if changed:
        raise InvalidArgumentError(
            f"the data of the run in {output} has changed since it began: {'; '.join(changed)}; bring the data back as "
            f"it was, begin another run, or delete {file} to go on with other data"
        )


def _fingerprint(spec: str, config: DataConfig) -> Fingerprint:
    digest, count = blake2b(digest_size=16), 0
    for document in islice(open_source(spec, config)(), STREAMED if config.streaming else None):
        digest.update(document.content_hash.to_bytes(HASH_BYTES, "little"))
        count += 1
    found: dict[str, str | int] = {"documents": count, "content": digest.hexdigest()}
    path = Path(spec).expanduser()
    if path.exists():
        files = folder_files(path, config.suffixes) if path.is_dir() else [path]
        found |= {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}
    return found


def _difference(spec: str, before: Fingerprint, now: Fingerprint) -> str:
    counts = [
        f"{before[name]} {name} became {now[name]} {name}"
        for name in ("files", "documents", "bytes")
        if name in before and name in now and before[name] != now[name]
    ]
    return f"{spec}: {', '.join(counts) or 'other content'}"
