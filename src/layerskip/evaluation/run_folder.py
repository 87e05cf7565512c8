"""The folder that a measurement writes: what was asked, every finished sample as it comes, the results at the end.

    run.json        kind and configuration, from the first sample on
    samples.jsonl   a JSON object a line, each with a `key`; whole lines only count
    results.json    one object: configuration, machine, results
    report.html     pictures

The same command goes on where an interrupted one stopped; another command needs another folder.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layerskip.differences import differences
from layerskip.errors import InvalidArgumentError
from layerskip.evaluation.samples import SampleStore
from layerskip.files import parse_json, to_json, write_atomically
from layerskip.locks import Lock
from layerskip.machine import describe_machine

SCHEMA = 1
"""Version of results.json."""
RUN_FILE, SAMPLES_FILE, RESULTS_FILE, REPORT_FILE = "run.json", "samples.jsonl", "results.json", "report.html"
LOCK_FILE = ".lock"


class RunFolder(SampleStore):
    """One measurement's folder; `open_run_folder` keeps other processes out of it."""

    def __init__(self, path: Path, kind: str, configuration: Mapping[str, Any]) -> None:
        """Open a folder, new or of an interrupted run of the same configuration.

        Args:
            path: The folder; made if it doesn't exist.
            kind: `benchmark`, `sweep`, `eval`, `verify` or `bench-serve`.
            configuration: All that the results depend on; JSON.

        Raises:
            InvalidArgumentError: It holds another configuration's results, or can't be written.
        """
        super().__init__()
        self.path, self.kind, self.place = path, kind, str(path)
        self.configuration: dict[str, Any] = json.loads(json.dumps(configuration, default=str))
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._check_run()
            self._read_samples()
        except OSError as error:
            raise _unusable(path, error) from error

    def add(self, key: str, sample: Mapping[str, Any]) -> None:
        """Keep a finished sample, on disk before this returns."""
        self._begin()
        record = {"key": key, **sample}
        try:
            line = json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # half a character, where a text was cut
            line = json.dumps(record).encode()
        with (self.path / SAMPLES_FILE).open("ab") as file:
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        super().add(key, sample)

    def finish(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """Write results.json, and return what is in it."""
        self._begin()
        content = {
            "schema": SCHEMA,
            "kind": self.kind,
            "configuration": self.configuration,
            "machine": describe_machine(),
            "results": parse_json(to_json(results)),
        }
        write_atomically(self.path / RESULTS_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        return content

    def _begin(self) -> None:
        """Say whose folder this is: not before something was finished, so that a wrong command leaves no trace."""
        file = self.path / RUN_FILE
        if not file.exists():
            write_atomically(file, json.dumps({"kind": self.kind, "configuration": self.configuration}, indent=2))

    def _check_run(self) -> None:
        file = self.path / RUN_FILE
        if not file.exists():
            if (self.path / SAMPLES_FILE).exists():
                raise InvalidArgumentError(f"{self.path} has a {SAMPLES_FILE} of something else; name another folder")
            return
        try:
            run = parse_json(file.read_text(encoding="utf-8"))
            kind, configuration = run["kind"], dict(run["configuration"])
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidArgumentError(f"{file} is no run of layerskip; name another folder") from error
        if kind != self.kind:
            raise InvalidArgumentError(f"{self.path} holds a run of layerskip {kind}; name another folder")
        if differing := differences(configuration, self.configuration):
            raise InvalidArgumentError(
                f"{self.path} holds results of another configuration ({', '.join(differing)}); "
                "name another folder, or delete it"
            )

    def _read_samples(self) -> None:
        file = self.path / SAMPLES_FILE
        if not file.exists():
            return
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # cut off in the middle of a line
            with file.open("r+b") as handle:
                handle.truncate(len(whole))
        for line in whole.splitlines():  # of bytes: only real line ends count, not those that texts may hold
            record = json.loads(line)
            self.samples[record["key"]] = record


@contextmanager
def open_run_folder(path: Path, kind: str, configuration: Mapping[str, Any]) -> Iterator[RunFolder]:
    """A folder that no other process can write to until the `with` block ends; arguments are `RunFolder`'s.

    Raises:
        InvalidArgumentError: As `RunFolder` does, and where another process writes to the folder.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = Lock(path / LOCK_FILE, f"output_dir {path}")
    except OSError as error:
        raise _unusable(path, error) from error
    with lock:
        yield RunFolder(path, kind, configuration)


def _unusable(path: Path, error: OSError) -> InvalidArgumentError:
    return InvalidArgumentError(f"output_dir {path} can't be used: {error.strerror}; name a folder that can be written")


def read_results(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A finished run: the object of results.json, and its samples.

    Raises:
        InvalidArgumentError: There is none.
    """
    try:
        content: dict[str, Any] = parse_json((folder / RESULTS_FILE).read_text(encoding="utf-8"))
        lines = (folder / SAMPLES_FILE).read_bytes().splitlines()
        samples = [json.loads(line) for line in lines]
    except FileNotFoundError as error:
        raise InvalidArgumentError(f"{folder} has no finished run: {Path(error.filename).name} is missing") from error
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"{folder} can't be read: {error}") from error
    if content.get("schema") != SCHEMA:
        raise InvalidArgumentError(f"{folder} was written by another version: schema {content.get('schema')!r}")
    return content, samples
