"""Results of `layerskip batch` while they come: finished lines are never run again.

OUTPUT.partial.jsonl    while it runs: a header with the configuration, then finished lines as the output has them
OUTPUT                  at the end, as a whole, in the input's order
"""

import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layerskip.decoding.config import GenerationConfig
from layerskip.differences import differences
from layerskip.errors import InvalidArgumentError
from layerskip.files import parse_json, write_atomically
from layerskip.locks import Lock

SCHEMA = 1
"""Version of the partial file."""
Record = dict[str, Any]
"""A line of the output, or what a line of JSON holds."""


class PartialResults:
    """Finished lines of a run, on disk; memory holds only where they are."""

    def __init__(self, output: Path, config: GenerationConfig, configuration: Mapping[str, Any]) -> None:
        """Begin, or go on where an interrupted run of the same configuration stopped.

        Args:
            output: The file that is to be written.
            config: How lines are decoded; where it samples and names no seed, one is drawn and kept.
            configuration: All that the results depend on; JSON.

        Raises:
            InvalidArgumentError: The output exists already, what was begun has another configuration, or the file
                can't be written.
        """
        self.output = output
        self.path = output.with_name(f"{output.name}.partial.jsonl")
        self.offsets: dict[int, int] = {}
        """Where in the file each finished line starts, in bytes."""
        self.errors = self.tokens = 0
        given: Record = json.loads(json.dumps(configuration, default=str))
        with self._writing():
            output.parent.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(output.with_name(f".{output.name}.lock"), f"output_file {output}")
            try:
                self.seed = self._open(config, given)
            except BaseException:
                self._lock.release()
                raise

    def add(self, records: Sequence[Record]) -> None:
        """Keep finished lines, on disk before this returns."""
        with self._writing(), self.path.open("ab") as file:
            place = file.tell()
            for record in records:
                content = json.dumps(record, ensure_ascii=False).encode() + b"\n"
                file.write(content)
                self._count(record, place)
                place += len(content)
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Write the output, in order, and remove what was only needed until then."""
        partial = self.output.with_name(f".{self.output.name}.{os.getpid()}.partial")
        with self._writing():
            with self.path.open("rb") as source, partial.open("wb") as target:
                for index in sorted(self.offsets):
                    source.seek(self.offsets[index])
                    line = source.readline()
                    self._check_line(line, index)
                    target.write(line)
                target.flush()
                os.fsync(target.fileno())
            os.replace(partial, self.output)
            self.path.unlink()
        self.close()

    def close(self) -> None:
        """Let others write to the output; what is finished stays."""
        self._lock.release()

    def _check_line(self, line: bytes, index: int) -> None:
        """Raise `InvalidArgumentError` unless a line of the partial file is the whole record of a prompt."""
        try:
            whole = line.endswith(b"\n") and parse_json(line)["index"] == index
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise InvalidArgumentError(
                f"{self.path} was changed while the run went on: where prompt {index} was written stands something "
                "else; delete it, and run the command again"
            )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InvalidArgumentError(
                f"output_file {self.output} can't be written: {error.strerror}; name a file that can"
            ) from error

    def _open(self, config: GenerationConfig, configuration: Record) -> int:
        """Make the file or read it; returns the run's seed."""
        if not self.path.exists():
            if self.output.exists():
                raise InvalidArgumentError(f"output_file {self.output} exists already; delete it, or name another file")
            drawn = secrets.randbits(63) if config.samples else 0
            seed = drawn if config.seed is None else config.seed
            header = {"schema": SCHEMA, "kind": "batch", "configuration": configuration, "seed": seed}
            write_atomically(self.path, json.dumps(header, ensure_ascii=False) + "\n")
            return seed
        with self.path.open("r+b") as file:
            seed = self._check_header(file.readline(), configuration)
            place = file.tell()
            for line in file:
                if not line.endswith(b"\n"):  # cut off in the middle
                    file.truncate(place)
                    break
                self._count(parse_json(line), place)
                place += len(line)
        return seed

    def _check_header(self, line: bytes, configuration: Record) -> int:
        try:
            header = parse_json(line)
            known = header["schema"] == SCHEMA and header["kind"] == "batch"
            there, seed = dict(header["configuration"]), int(header["seed"])
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidArgumentError(f"{self.path} is no run of layerskip batch; name another output file") from error
        if not known:
            raise InvalidArgumentError(f"{self.path} was written by another version; finish it there, or delete it")
        if differing := differences(there, configuration):
            raise InvalidArgumentError(
                f"{self.path} holds results of another configuration ({', '.join(differing)}); "
                "name another output file, or delete it"
            )
        return seed

    def _count(self, record: Record, place: int) -> None:
        if record["index"] not in self.offsets:
            self.errors += "error" in record
            self.tokens += len(record.get("token_ids", ()))
        self.offsets[record["index"]] = place
