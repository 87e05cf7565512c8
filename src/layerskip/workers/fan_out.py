"""Work on many items, in this process or wherever a mapper takes it.

A worker is made once where it works (it loads the model), and is then called with one item after the other; each call
yields results, which reach the caller as they come.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

Worker = Callable[[Any], Iterable[Any]]
"""From an item to its results."""
Mapper = Callable[[Sequence[Any], Callable[[], Worker]], Iterator[Any]]
"""From items, and what makes a worker (both can be pickled), to the results of all items, those of an item in order."""


def in_process(items: Sequence[Any], make_worker: Callable[[], Worker]) -> Iterator[Any]:
    """The mapper that works here, on one item after the other; without items it makes no worker."""
    if not items:
        return
    worker = make_worker()
    for item in items:
        yield from worker(item)


class LoadOnce:
    """Makes something that is expensive when first asked, and keeps it; what is pickled is only how to make it."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._kept = make, None

    def __call__(self) -> Any:
        """What `make` returns."""
        if self._kept is None:
            self._kept = self._make()
        return self._kept

    def __getstate__(self) -> dict[str, Any]:
        return {"_make": self._make, "_kept": None}
