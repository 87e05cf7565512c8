"""Which layers run, as a decoder tells it (`LayerCalls.observer`)."""

from collections.abc import Callable

Entry = tuple[int, int, int]
"""Layer, rows and queries."""


def entries_of(log: list[Entry]) -> Callable[[int, int, int, int], None]:
    """An observer that lists every entry into a layer."""

    def observe(start: int, stop: int, num_rows: int, num_queries: int) -> None:
        log.extend((layer, num_rows, num_queries) for layer in range(start, stop))

    return observe
