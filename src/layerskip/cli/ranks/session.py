"""What the ranks of a command have in common: the process group, the user's input, and files that one of them writes.

All ranks run the same command on the same input and come to the same decisions. Rank 0 talks to the user and writes
files; the others write nowhere, or into copies of their own.
"""

import io
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from layerskip.cli.exit_code import ExitCode
from layerskip.cli.ranks.place import Place, place
from layerskip.cores import find_cores
from layerskip.errors import brief

if TYPE_CHECKING:
    pass

PATIENCE = timedelta(days=7)
"""How long a rank waits for another, such as for a user who types. Ranks that die are noticed by other means."""


class RankSession:
    """This process among the ranks of a command."""

    def __init__(self, own: Place) -> None:
        """Join the others.

        Args:
            own: This process's place.
        """
        import torch
        import torch.distributed as dist
        from torch._C._distributed_c10d import FileStore

        from layerskip.model.parallel.group import RankGroup

        self.place = own
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or max(1, find_cores().usable // own.num_ranks)))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        if own.one_machine:
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # nobody else can connect
                os.environ.setdefault(name, "lo0" if sys.platform == "darwin" else "lo")
            store = FileStore(_meeting_file(own), own.num_ranks)
            dist.init_process_group(backend, store=store, rank=own.rank, world_size=own.num_ranks, timeout=PATIENCE)
        else:
            dist.init_process_group(backend, timeout=PATIENCE)
        self.group: RankGroup = RankGroup()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        signal.signal(signal.SIGINT, self._interrupt if own.leads else signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._terminate)
        self._share_streams()

    def failed(self, error: BaseException) -> None:
        """Tell the others why this rank can't go on."""
        self.group.watch.failed(f"{type(error).__name__}: {brief(error)}")

    def close(self) -> None:
        """Leave the others."""
        import torch.distributed as dist

        self.group.watch.stop()
        with suppress(RuntimeError):
            dist.destroy_process_group()
        if self._folder is not None:
            self._folder.cleanup()
        if self.place.leads and self.place.one_machine:
            Path(_meeting_file(self.place)).unlink(missing_ok=True)

    def everywhere(self, read: Callable[[], bytes | None]) -> bytes | None:
        """What rank 0 reads, in all ranks."""
        content = read() if self.place.leads else None
        return self.group.first_bytes(content)

    def own_copy(self, path: Path) -> Path:
        """Where this rank may write what the command writes to a path: there in rank 0, elsewhere a copy of it."""
        copy = path
        if not self.place.leads:
            self._folder = self._folder or tempfile.TemporaryDirectory(prefix="layerskip-rank-")
            copy = Path(self._folder.name) / path.name
            for existing in path.parent.glob(f"{path.name}*") if path.parent.is_dir() else ():
                with suppress(OSError):
                    _copy(existing, copy.with_name(existing.name))
        self.group.first(0)  # nobody writes before all have copied
        return copy

    def _share_streams(self) -> None:
        """Let all ranks see rank 0's standard input, and believe that they write to what rank 0 writes to."""
        terminals = sum(2**bit * stream.isatty() for bit, stream in enumerate((sys.stdin, sys.stdout)))
        terminals = self.group.first(terminals)
        sys.stdin = _SharedInput(self, sys.stdin, terminal=bool(terminals & 1))
        if not self.place.leads:
            nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            sys.stdout = sys.stderr = _Nowhere(nowhere, terminal=bool(terminals & 2))

    def _interrupt(self, *_: Any) -> NoReturn:
        """Ctrl-C ends all ranks: they can't all stop after the same token."""
        self.group.watch.failed("")
        sys.stdout.flush()
        os._exit(ExitCode.INTERRUPTED)

    def _terminate(self, *_: Any) -> NoReturn:
        """Torchrun ends the ranks that are left when one dies: say which one that was."""
        self.group.watch.wait_for_verdict(seconds=3.0)  # the watch reports it, and ends the process
        os._exit(128 + signal.SIGTERM)


class _SharedInput:
    """Standard input that rank 0 reads, and all ranks get."""

    def __init__(self, session: RankSession, stream: Any, *, terminal: bool) -> None:
        self._session, self._stream, self._terminal = session, stream, terminal
        self._content: io.BytesIO | None = None

    def isatty(self) -> bool:
        return self._terminal

    @property
    def buffer(self) -> io.BytesIO:
        """All of it, read when first asked for."""
        if self._content is None:
            content = self._session.everywhere(lambda: bytes(self._stream.buffer.read()))
            self._content = io.BytesIO(content or b"")
        return self._content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Nowhere:
    """Standard output of a rank that nobody reads."""

    def __init__(self, stream: Any, *, terminal: bool) -> None:
        self._stream, self._terminal = stream, terminal

    def isatty(self) -> bool:
        return self._terminal

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@cache
def join() -> RankSession | None:
    """The session of this process, which begins at the first call; None where the process runs alone."""
    own = place()
    return None if own is None else RankSession(own)


def joined() -> RankSession | None:
    """The session of this process, if it has begun."""
    return join() if join.cache_info().currsize else None


def own_copy(path: Path) -> Path:
    """Where this process may write what the command writes to a path (`RankSession.own_copy`)."""
    session = joined()
    return path if session is None else session.own_copy(path)


def common(number: int) -> int:
    """Rank 0's number, from 0 to 2^63 - 1, in all ranks of this command."""
    session = joined()
    return number if session is None else session.group.first(number)


def _meeting_file(own: Place) -> str:
    """A file that all ranks of this command know, and nobody else can write to."""
    if own.folder is not None:
        return str(Path(own.folder) / "store")
    parent = os.getppid()  # torchrun
    folder = Path(tempfile.gettempdir()) / f"layerskip-ranks-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.is_symlink():
        raise OSError(f"{folder} belongs to somebody else")
    try:
        began = (
            Path(f"/proc/{parent}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
        )
    except (OSError, IndexError):
        began = os.environ.get("MASTER_PORT", "0")
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return str(folder / f"{parent}-{began}-{attempt}")


def _copy(path: Path, to: Path) -> None:
    if path.is_dir():
        shutil.copytree(path, to, dirs_exist_ok=True)
    else:
        shutil.copy2(path, to)
