"""One process at a time for each place that results are written to."""

from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import BaseFileLock, FileLock, Timeout

from layerskip.errors import InvalidArgumentError


class Lock:
    """Held from the beginning until the `with` block or the process ends, however that may be."""

    def __init__(self, file: Path, what: str) -> None:
        """Take the lock.

        Args:
            file: The lock's own file, beside or in what it protects; a file that a killed process left locks nothing.
            what: What it protects, for the error.

        Raises:
            InvalidArgumentError: Another process holds it.
            OSError: The file can't be made.
        """
        self._file = file
        self._lock: BaseFileLock = FileLock(file, timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise InvalidArgumentError(
                f"{what} is in use by another run of layerskip; wait for it, or name another place"
            ) from None
        except NotImplementedError:  # a file system without locks: as it was before there were any
            pass

    def __enter__(self) -> Self:
        """The lock, which is held already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release it."""
        self.release()

    def release(self) -> None:
        """Let others in, and remove the file."""
        if self._lock.is_locked:
            with suppress(OSError):
                self._file.unlink()
            self._lock.release()
