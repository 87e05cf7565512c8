"""Cores that this process may use for computing: physical ones, the fast ones where a machine has two kinds.

Several threads on one core share its arithmetic, threads beyond a container's limit are stopped for most of each
period, and threads that wait for one another are as slow as the slowest core.
"""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables that torch takes its number of threads from."""
LEAST_CAPACITY = 0.75
"""A core is a fast one if its capacity or its highest clock is at least this share of the fastest core's."""


@dataclass(frozen=True, kw_only=True)
class Cores:
    """What a process may use of a machine's cores."""

    logical: int
    """Processors that the system may run the process on (its affinity mask)."""
    physical: int
    """Cores of these; fewer where a core runs several threads."""
    fast: int
    """Physical cores without those that save energy."""
    quota: float | None
    """Cores' worth of time that control groups allow; None: no limit."""

    @property
    def usable(self) -> int:
        """Threads that compute without getting in one another's way."""
        return self.fast if self.quota is None else max(1, min(self.fast, math.floor(self.quota)))

    @property
    def torch_defaults(self) -> frozenset[int]:
        """Numbers of threads that torch may choose by itself."""
        return frozenset({self.logical, self.physical, os.cpu_count() or 1})

    def describe(self) -> str:
        """How the number of usable cores came about."""
        parts = [f"{self.logical} processors that this process may run on"]
        if self.physical < self.logical:
            parts.append(f"on {self.physical} physical cores")
        if self.fast < self.physical:
            parts.append(f"of which {self.fast} are fast ones")
        if self.quota is not None and self.quota < self.fast:
            parts.append(f"with a limit of {self.quota:g} cores' time")
        return ", ".join(parts)


def find_cores(root: Path = Path("/"), affinity: Iterable[int] | None = None) -> Cores:
    """What the system says about cores; counts fall back to the affinity mask where it says nothing.

    Args:
        root: Folder that has `sys` and `proc`.
        affinity: Numbers of the processors that the process may run on; what the system allows if not given.
    """
    allowed = _affinity() if affinity is None else sorted(set(affinity))
    cpus = root / "sys/devices/system/cpu"
    siblings = {number: _core_of(cpus, number) for number in allowed}
    fast = _fast(cpus, allowed)
    return Cores(
        logical=len(allowed),
        physical=len(set(siblings.values())),
        fast=len({siblings[number] for number in fast}),
        quota=_quota(root),
    )


def _affinity() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None


def _number(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text is not None and text.isascii() and text.isdigit() else None


def _core_of(cpus: Path, number: int) -> str:
    """A name for the physical core of a processor: the list of processors on it, itself if nothing is known."""
    topology = cpus / f"cpu{number}" / "topology"
    return _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list") or str(number)


def _fast(cpus: Path, allowed: Sequence[int]) -> list[int]:
    """The processors whose cores are fast ones; all if the system doesn't tell them apart.

    ARM systems give each processor a capacity. x86 ones list those of each kind; where they don't, kinds differ in
    their highest clock.
    """
    kinds = _read(cpus.parent.parent / "cpu_core/cpus")
    if kinds is not None:
        fast = [number for number in allowed if number in _members(kinds)]
        return fast or list(allowed)
    for measure in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        found = [_number(cpus / f"cpu{number}" / measure) for number in allowed]
        if all(found):
            least = LEAST_CAPACITY * max(value or 0 for value in found)
            return [number for number, value in zip(allowed, found, strict=True) if (value or 0) >= least]
    return list(allowed)


def _members(text: str) -> set[int]:
    """Numbers of a list such as `0-3,8`."""
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdigit() and (last or first).isdigit():
            numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def _quota(root: Path) -> float | None:
    """The tightest limit of the process's control groups and of those above them, in cores."""
    limits = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        hierarchy, controllers, path = [*line.split(":", 2), "", ""][:3]
        if hierarchy == "0" and not controllers:
            base, limit = root / "sys/fs/cgroup", _version_2
        elif "cpu" in controllers.split(","):
            base, limit = _version_1_folder(root, controllers), _version_1
        else:
            continue
        # In a container the path may be the host's, which isn't there: then the group's own folder is the root.
        inner = Path(path.lstrip("/"))
        limits += [limit(base / folder) for folder in (inner, *inner.parents)]
    return min((limit for limit in limits if limit is not None), default=None)


def _version_1_folder(root: Path, controllers: str) -> Path:
    named = root / "sys/fs/cgroup" / controllers
    return named if named.exists() else root / "sys/fs/cgroup/cpu"


def _version_2(group: Path) -> float | None:
    parts = (_read(group / "cpu.max") or "").split()
    if len(parts) != 2 or not all(part.isdigit() for part in parts) or int(parts[1]) == 0:
        return None
    return int(parts[0]) / int(parts[1])


def _version_1(group: Path) -> float | None:
    quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    return quota / period if quota and period else None  # a quota of -1 is no number here: no limit


def default_threads(torch_threads: int, cores: Cores | None = None) -> tuple[int, str]:
    """How many threads compute, and how that number came about.

    A number that someone has chosen stays: by an environment variable, or by another call than torch's own start.

    Args:
        torch_threads: Threads that torch uses now.
        cores: What the process may use; what the system says if not given.
    """
    for name in THREAD_VARIABLES:
        if os.environ.get(name):
            return torch_threads, f"{name}={os.environ[name]}"
    cores = find_cores() if cores is None else cores
    if torch_threads not in cores.torch_defaults:
        return torch_threads, "chosen by this program"
    return min(torch_threads, cores.usable), cores.describe()
