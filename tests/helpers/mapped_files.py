"""How much of a mapped file a process has touched; for tests of what is read of a checkpoint."""

import os
from pathlib import Path

import pytest

SMAPS = Path("/proc/self/smaps")
LARGE_PAGE = 2 * 2**20
"""Bytes that one access may bring in: the system maps what lies around it as well."""

needs_smaps = pytest.mark.skipif(not os.access(SMAPS, os.R_OK), reason="needs Linux's /proc")


def resident_bytes(path: Path) -> int:
    """Bytes of a file in the mappings of this process that some access has brought in.

    This says which pages the process has touched, rounded up to what the system maps at once. What the system reads
    from the disk ahead of that, it doesn't say.
    """
    total, ours = 0, False
    for line in SMAPS.read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            ours = rest[-1:] == [str(path)]
        elif ours and first == "Rss:":
            total += int(rest[0]) * 1024
    return total
