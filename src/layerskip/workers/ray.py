"""The mapper whose workers are on a Ray cluster.

Plain actors do it, not Ray Data. Ray Data streams results and restarts actors too, but it runs an item again for ever
when the item itself kills its worker (what limits that is deprecated there), keeps rows as Arrow tables, in which lists
come back as arrays, and can't be made quiet in all its versions.
"""

import logging
import os
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

from layerskip.errors import InvalidArgumentError, LayerSkipError
from layerskip.workers.fan_out import Mapper, Worker

MAX_RETRIES = 3
"""Times that an item is run again when its worker dies: one that kills every worker must come to an end."""
MAX_RESTARTS = 20
"""Times that a worker is started again: one that dies while it starts must come to an end, too."""
CONNECT_SECONDS = 10
"""Time in which a cluster must answer."""
IN_FLIGHT = 2
"""Items that a worker has at a time: the one it works at, and the next."""


@contextmanager
def ray_mapper(*, num_workers: int | None = None, use_gpus: bool = True, most_items: int) -> Iterator[Mapper]:
    """A mapper that shares items out over the workers of a Ray cluster, and yields results as items are done.

    The cluster is the one that this process has joined, or else that of `RAY_ADDRESS`, or else one on this machine
    that ends with the context. Other machines need this package and the same paths. Workers start with the first
    items, and stay until the context ends or another kind of worker is asked for.

    Args:
        num_workers: Number of workers; one for each GPU if not given, or for each CPU core where there is none. The
            cores are shared out among them, as torch's threads.
        use_gpus: Give each worker a GPU of its own, where there are any.
        most_items: Most items of any list; more workers than that are not started.

    Yields:
        The mapper. It raises `InvalidArgumentError` if the cluster can't be joined or has no room for so many workers,
        and what a worker raised: a `LayerSkipError` as it is, any other exception as a `RuntimeError` with its
        traceback. An item whose workers die again and again is a `LayerSkipError`.

    Raises:
        InvalidArgumentError: Ray is missing, or a number of workers below 1.
    """
    if num_workers is not None and num_workers < 1:
        raise InvalidArgumentError(f"num_workers must be at least 1, got {num_workers}")
    import_ray()
    with ExitStack() as stack:
        kind: Callable[[], Worker] | None = None
        workers: RayWorkers | None = None

        def map_items(items: Sequence[Any], make_worker: Callable[[], Worker]) -> Iterator[Any]:
            nonlocal kind, workers
            if not items:
                return
            if workers is None or make_worker != kind:
                stack.close()
                workers = None
                workers = RayWorkers(make_worker, num_workers=num_workers, use_gpus=use_gpus, most_items=most_items)
                stack.enter_context(workers)
                kind = make_worker
            yield from workers.map(items)

        yield map_items


class RayWorkers:
    """Workers on a Ray cluster, which stay for one list of items after the other; a context that ends them."""

    def __init__(
        self,
        make_worker: Callable[[], Worker],
        *,
        num_workers: int | None = None,
        use_gpus: bool = True,
        most_items: int,
    ) -> None:
        """Join or start a cluster, and start workers; arguments and errors are those of `ray_mapper`."""
        self._ray = import_ray()
        self._actors: list[Any] = []
        self._started = _join_cluster(self._ray, num_workers)
        try:
            self._actors += _start_actors(self._ray, make_worker, num_workers, most_items, use_gpus)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RayWorkers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, and the cluster if it was started for them."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors.clear()
        if self._started:
            self._ray.shutdown()
        self._started = False

    def map(self, items: Sequence[Any]) -> Iterator[Any]:
        """Results of all items, in the order in which items are done."""
        running: dict[Any, tuple[int, Any]] = {}  # by a result's reference: the item's place, and the actor
        waiting = iter(range(len(items)))

        def give_next(actor: Any) -> None:
            for place in islice(waiting, 1):
                running[actor.work.remote(items[place])] = place, actor

        for actor in self._actors * IN_FLIGHT:
            give_next(actor)
        while running:
            (reference,), _ = self._ray.wait(list(running), num_returns=1)
            place, actor = running.pop(reference)
            results, failure = _fetch(self._ray, reference, place)
            if failure is not None:
                raise failure
            give_next(actor)
            yield from results


def import_ray() -> Any:
    """Import Ray, with its usage reports disabled.

    Raises:
        InvalidArgumentError: It isn't installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise InvalidArgumentError("Ray is not installed here: pip install 'layerskip[ray]'") from error
    return ray


class _Actor:
    """The worker in an actor. Its exceptions travel as results, so that they arrive as they are."""

    def __init__(self, make_worker: Callable[[], Worker], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._worker: Worker | None = None
        self._failure: Exception | None = None
        try:
            self._worker = make_worker()
        except Exception as error:
            self._failure = _portable(error)

    def work(self, item: Any) -> tuple[list[Any], Exception | None]:
        """All results of an item together, or why there are none."""
        if self._worker is None:
            return [], self._failure
        try:
            return list(self._worker(item)), None
        except Exception as error:
            return [], _portable(error)


def _portable(error: Exception) -> Exception:
    """An exception that can be pickled and says where it comes from."""
    if isinstance(error, LayerSkipError):
        return error
    return RuntimeError("a worker failed:\n" + "".join(traceback.format_exception(error)))


def _fetch(ray: Any, reference: Any, place: int) -> tuple[list[Any], Exception | None]:
    """What an actor returned for an item; Ray has run it again where the actor died."""
    try:
        fetched: tuple[list[Any], Exception | None] = ray.get(reference)
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error).split())
        raise LayerSkipError(
            f"Ray gave up on item {place}, whose worker died again and again; give workers more memory (fewer workers, "
            f"smaller batches), or leave the item out: {reason or error!r}"
        ) from error
    return fetched


def _join_cluster(ray: Any, num_workers: int | None) -> bool:
    """Join a cluster or start one; whether that is to be undone at the end."""
    if ray.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS") or "local"
    # A cluster of our own has a slot for each worker, even where there are fewer cores.
    own = {"num_cpus": max(os.cpu_count() or 1, num_workers or 1), "include_dashboard": False}
    try:
        _knock(address)
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **(own if address == "local" else {}),
        )
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(
            f"the Ray cluster at RAY_ADDRESS {address!r} can't be joined: {error}; correct the variable, set "
            "RAY_AUTH_MODE=token if it is a cluster that wants a token, or unset RAY_ADDRESS to work on this machine"
        ) from error
    return True


def _knock(address: str) -> None:
    """Raise OSError if nobody answers at host:port; Ray would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()


def _start_actors(
    ray: Any, make_worker: Callable[[], Worker], num_workers: int | None, num_items: int, use_gpus: bool
) -> list[Any]:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = use_gpus and any(node.get("GPU", 0) >= 1 for node in nodes)
    num_workers, cpus = share_out(nodes, num_workers, num_items, gpus=gpus)
    actor = ray.remote(_Actor).options(
        num_cpus=cpus, num_gpus=1 if gpus else 0, max_restarts=MAX_RESTARTS, max_task_retries=MAX_RETRIES
    )
    return [actor.remote(make_worker, cpus) for _ in range(num_workers)]


def share_out(
    nodes: Sequence[Mapping[str, float]], num_workers: int | None, num_items: int, *, gpus: bool
) -> tuple[int, int]:
    """Number of workers, and the most CPU cores that each may have so that all find a place.

    Args:
        nodes: Resources of each machine: `CPU`, `GPU`.
        num_workers: Number of workers that is asked for; as many as there is room for if not given.
        num_items: More workers than items are not made.
        gpus: Each worker needs a GPU.

    Raises:
        InvalidArgumentError: There is no room for them.
    """

    def room(cpus: int) -> int:
        slots = (int(node.get("CPU", 0)) // cpus for node in nodes)
        limits = (int(node.get("GPU", 0)) if gpus else num_items for node in nodes)
        return sum(min(pair) for pair in zip(slots, limits, strict=True))

    most = sum(int(node.get("GPU" if gpus else "CPU", 0)) for node in nodes)
    workers = min(most if num_workers is None else num_workers, num_items)
    if not 1 <= workers <= room(1):
        what = "GPUs, each with a CPU core" if gpus else "CPU cores"
        raise InvalidArgumentError(f"the Ray cluster has {room(1)} {what}, and {workers} workers need one each")
    largest = max(int(node.get("CPU", 0)) for node in nodes)
    return workers, max(cpus for cpus in range(1, largest + 1) if room(cpus) >= workers)
