"""How the configuration of results that are there differs from the one that is asked for."""

from collections.abc import Mapping
from typing import Any


def differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Entries that differ, for an error message: name, value there, value asked, such as `seed 0, not 5`.

    Args:
        there: What the results were made with.
        asked: What is asked for now. An entry that one of both lacks differs from any value, and is shown as None.

    Returns:
        The differing entries by name; none where both are the same.
    """
    missing = object()
    return [
        f"{name} {there.get(name)!r}, not {asked.get(name)!r}"
        for name in sorted(there.keys() | asked.keys())
        if there.get(name, missing) != asked.get(name, missing)
    ]
