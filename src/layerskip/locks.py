"""Locks: only one process at a time writes to a place."""

from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import BaseFileLock, FileLock, Timeout

from layerskip.errors import InvalidArgumentError


class Lock:
    """A lock that is taken on creation and released when the `with` block or the process ends, in whatever way."""

    def __init__(self, file: Path, what: str) -> None:
        """Take the lock.

        Args:
            file: The lock's own file, beside or in the protected place; a file left by a killed process locks nothing.
            what: Name of the protected place, for the error.

        Raises:
            InvalidArgumentError: Another process has the lock.
            OSError: The file can't be created.
        """
        self._file = file
        self._lock: BaseFileLock = FileLock(file, timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise InvalidArgumentError(
                f"{what} is in use by another run of layerskip; wait for it, or name another place"
            ) from None
        except NotImplementedError:
            pass  # filelock 3 on a file system without locks: continue without one. filelock 4 locks by a file there.

    def __enter__(self) -> Self:
        """Return the lock, which is taken already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release it."""
        self.release()

    def release(self) -> None:
        """Release the lock and remove its file."""
        if self._lock.is_locked:
            with suppress(OSError):
                self._file.unlink()
            self._lock.release()
