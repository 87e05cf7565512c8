"""Ranks that die: the others end too, soon, and say which one it was.

Every rank counts up a number of its own in the store of the process group, and looks at the others' numbers. A rank
whose number stands still is dead; one that fails leaves its error message there. A rank that waits for such a rank in a
collective would wait forever (NCCL) or end with a message about sockets (gloo).
"""

import atexit
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from layerskip.errors import RankLostError, brief

BEAT_SECONDS = 0.5
"""Seconds between two looks at the others."""
SILENT_SECONDS = 12.0
"""Seconds without a sign of life after which a rank is dead: loading and long passes of the network leave the
interpreter to the thread that beats."""
GRACE_SECONDS = 15.0
"""Seconds that a rank whose exchange has failed waits to learn whose fault it was."""
OWN_SECONDS = 2.0
"""Seconds that a rank gets to fail by itself when another one has failed: bad input fails everywhere."""
FAILED_CODE, INTERRUPTED_CODE = 2, 130
"""Exit codes of a process that another rank has taken down, and of one whose rank 0 was interrupted."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Why this process can't go on."""

    rank: int | None
    """The rank that is lost; None if all are, as far as this one can see."""
    message: str
    """Names it; empty if the user has interrupted it."""
    has_died: bool
    """Whether it ended without a word."""


class Watch:
    """A rank's thread that beats, and watches the others."""

    def __init__(self, store: Store, rank: int, size: int, *, end: Callable[[Verdict], None]) -> None:
        """Begin.

        Args:
            store: Where all ranks can read and write.
            rank: This rank.
            size: N.
            end: Called in the thread once a rank is lost.
        """
        self._store, self._rank, self._size, self._end = store, rank, size, end
        self._others = [other for other in range(size) if other != rank]
        self._verdict: Verdict | None = None
        self._done, self._found = threading.Event(), threading.Event()
        store.set(_key("process", rank), f"{os.getpid()} {os.uname().nodename}")
        self._thread = threading.Thread(target=self._run, name="layerskip-watch", daemon=True)
        self._thread.start()
        atexit.register(self._join)

    def failed(self, message: str) -> None:
        """Tell the others that this rank can't go on; without a message, that the user has interrupted it."""
        self._done.set()
        with suppress(Exception):
            self._store.set(_key("failure", self._rank), f"!{message}")

    def stop(self) -> None:
        """This rank is done; the others may end later."""
        self._done.set()
        with suppress(Exception):
            self._store.set(_key("done", self._rank), "1")

    def wait_for_verdict(self, seconds: float = GRACE_SECONDS) -> Verdict | None:
        """Which rank was lost, if that turns out soon."""
        self._found.wait(seconds)
        return self._verdict

    def _join(self) -> None:
        """A thread that is in the store's code while the interpreter ends would abort the process."""
        self._done.set()
        self._thread.join(2 * BEAT_SECONDS)

    def _run(self) -> None:
        counts: dict[int, tuple[bytes, float]] = {}
        beats = 0
        while not self._done.wait(BEAT_SECONDS):
            beats += 1
            try:
                verdict = self._look(counts, beats)
            except Exception as error:  # the store lives in another process
                message = f"the process that keeps the ranks together can't be reached any more ({brief(error)})"
                verdict = Verdict(rank=None, message=message, has_died=True)
            if verdict is None:
                continue
            if not verdict.has_died and self._done.wait(OWN_SECONDS):
                return  # this rank fails by itself, for the same reason
            if verdict.has_died:  # so that others don't take this rank's end for the first
                with suppress(Exception):
                    self._store.set(_key("lost", self._rank), verdict.message)
            self._verdict = verdict
            self._found.set()
            self._end(verdict)
            return

    def _look(self, counts: dict[int, tuple[bytes, float]], beats: int) -> Verdict | None:
        """A rank that is lost."""
        store = self._store

        def has(key: str) -> bool:
            return bool(store.check([key]))

        def get(key: str) -> bytes:
            return bytes(store.get(key))

        here = os.uname().nodename
        if any(
            has(_key("process", rank)) and not get(_key("process", rank)).decode().endswith(here)
            for rank in self._others
        ):  # another machine can't see whether a process lives
            self._store.set(_key("beat", self._rank), str(beats))
        known_by_others = [rank for rank in self._others if has(_key("lost", rank))]
        if known_by_others:
            return Verdict(rank=None, message=get(_key("lost", known_by_others[0])).decode(), has_died=True)
        now = time.monotonic()
        for rank in self._others:
            name = f"rank {rank} of {self._size}"
            if has(_key("failure", rank)):
                reason = get(_key("failure", rank)).decode()[1:]
                message = f"{name} failed: {reason}" if reason else ""
                return Verdict(rank=rank, message=message, has_died=False)
            if has(_key("done", rank)) or not has(_key("process", rank)):
                continue
            if _has_died(get(_key("process", rank)).decode()):
                return Verdict(rank=rank, message=f"{name} died: its process is gone", has_died=True)
            count = get(_key("beat", rank)) if has(_key("beat", rank)) else b""
            known, since = counts.get(rank, (b"", now))
            if count != known:
                counts[rank] = count, now
            elif count and now - since > SILENT_SECONDS:
                message = f"{name} died: no sign of life for {now - since:.0f} seconds"
                return Verdict(rank=rank, message=message, has_died=True)
        return None


@functools.cache
def process_watch() -> Watch:
    """The watch of this process, one of several ranks of an initialised process group; it begins at the first call.

    If another rank is lost, it says so on standard error and ends the process.
    """
    rank = dist.get_rank()

    def end(verdict: Verdict) -> None:
        if verdict.message and (verdict.has_died or rank == 0):  # rank 0 has reported its own errors
            print(f"layerskip: error: {verdict.message}; rank {rank} ends too", file=sys.__stderr__, flush=True)
        os._exit(FAILED_CODE if verdict.message else INTERRUPTED_CODE)

    return Watch(dist.distributed_c10d._get_default_store(), rank, dist.get_world_size(), end=end)


@contextmanager
def lost() -> Iterator[None]:
    """Around an exchange: if it fails, the error says which rank was lost.

    Raises:
        RankLostError: The exchange failed.
    """
    try:
        yield
    except RuntimeError as error:
        verdict = process_watch().wait_for_verdict()
        raise RankLostError("another rank was lost" if verdict is None else verdict.message) from error


def _has_died(place: str) -> bool:
    """Whether a process `PID HOST` of this machine is gone, or is only still listed."""
    pid, _, host = place.partition(" ")
    if host != os.uname().nodename:
        return False
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return os.path.isdir("/proc/self")
    except (OSError, IndexError):
        return False


def _key(what: str, rank: int) -> str:
    return f"layerskip/{what}/{rank}"
