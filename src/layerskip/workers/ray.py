"""Map items over the workers of a Ray cluster, with results as they come.

Plain actors do it, not Ray Data. Ray Data streams results and restarts actors too, but it runs an item again for ever
when the item itself kills its worker (what limits that is deprecated there), keeps rows as Arrow tables, in which lists
come back as arrays, and can't be made quiet in all its versions.
"""

import logging
import os
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from layerskip.errors import InvalidArgumentError, LayerSkipError

MAX_RETRIES = 3
"""Times that an item is run again when its worker dies: one that kills every worker must come to an end."""
MAX_RESTARTS = 20
"""Times that a worker is started again: one that dies while it starts must come to an end, too."""
CONNECT_SECONDS = 10
"""Time in which a cluster must answer."""
IN_FLIGHT = 2
"""Items that a worker holds: the one it works at, and the next."""

Worker = Callable[[Any], Any]


def ray_map(
    items: Sequence[Any],
    make_worker: Callable[[], Worker],
    *,
    num_workers: int | None = None,
    use_gpus: bool = True,
) -> Iterator[tuple[int, Any]]:
    """Call a worker for each item, on all workers at once.

    The cluster is the one that this process has joined, or else that of `RAY_ADDRESS`, or else one on this machine
    that goes when the iterator ends. Other machines need this package and the same paths.

    Args:
        items: What to work at; can be pickled.
        make_worker: Makes a worker in its own process, once; can be pickled.
        num_workers: Number of workers; one for each GPU if not given, or for each CPU core where there is none. The
            cores are shared out among them, as torch's threads.
        use_gpus: Give each worker a GPU of its own, where there are any.

    Returns:
        Pairs of an item's place and its result, each item once, in the order in which they are done.

    Raises:
        InvalidArgumentError: Ray is missing, or the cluster has no room for so many workers.
        LayerSkipError: What a worker raised, or a worker died too often. Any other exception of a worker comes as a
            RuntimeError with its traceback.
    """
    if num_workers is not None and num_workers < 1:
        raise InvalidArgumentError(f"num_workers must be at least 1, got {num_workers}")
    import_ray()
    return _map(items, make_worker, num_workers, use_gpus) if items else iter(())


def _map(
    items: Sequence[Any], make_worker: Callable[[], Worker], num_workers: int | None, use_gpus: bool
) -> Iterator[tuple[int, Any]]:
    workers = RayWorkers(make_worker, num_workers=num_workers, use_gpus=use_gpus, most_items=len(items))
    with workers:
        yield from workers.map(items)


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
        """Join or start a cluster, and start workers; no more than `most_items`. The rest is as in `ray_map`."""
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

    def map(self, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Pairs of an item's place and its result, in the order in which they are done."""
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
            result, failure = _fetch(self._ray, reference, place)
            if failure is not None:
                raise failure
            give_next(actor)
            yield place, result


def import_ray() -> Any:
    """Ray, which tells nobody that it is used.

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

    def work(self, item: Any) -> tuple[Any, Exception | None]:
        """The item's result, or why there is none."""
        if self._worker is None:
            return None, self._failure
        try:
            return self._worker(item), None
        except Exception as error:
            return None, _portable(error)


def _portable(error: Exception) -> Exception:
    """An exception that can be pickled and says where it comes from."""
    if isinstance(error, LayerSkipError):
        return error
    return RuntimeError("a worker failed:\n" + "".join(traceback.format_exception(error)))


def _fetch(ray: Any, reference: Any, place: int) -> tuple[Any, Exception | None]:
    """What an actor made of an item; Ray has run it again where the actor died."""
    try:
        fetched: tuple[Any, Exception | None] = ray.get(reference)
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
