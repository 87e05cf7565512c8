"""Where the work of a command is done: in this process, or by workers on a Ray cluster."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stdout
from functools import partial
from typing import TYPE_CHECKING, Any

from layerskip.cli.flags.arguments import ModelArguments, OutputArguments
from layerskip.cli.flags.ray import RayArguments, anywhere
from layerskip.cli.terminal.terminal import load_model

if TYPE_CHECKING:
    from layerskip.workers.fan_out import Mapper, Worker


def model_loader(model: ModelArguments) -> Callable[[], Any]:
    """What loads the model quietly, once, in this process or in one that may work in another folder."""
    from layerskip.workers.fan_out import LoadOnce

    return LoadOnce(partial(load_model, anywhere(model), OutputArguments(json=True)))


def make_mapper(arguments: RayArguments, model: ModelArguments, most_items: int) -> AbstractContextManager["Mapper"]:
    """This process, or workers on a Ray cluster, no more than items; they stay until the context ends."""
    from layerskip.workers.fan_out import in_process

    if not arguments.ray:
        return nullcontext(in_process)
    return _on_cluster(arguments.num_workers, model.device != "cpu", most_items)


def keep_output_clean(arguments: RayArguments) -> AbstractContextManager[object]:
    """Ray tells of workers that died on standard output, which is the JSON's."""
    return redirect_stdout(sys.stderr) if arguments.ray else nullcontext()


@contextmanager
def _on_cluster(num_workers: int | None, use_gpus: bool, most_items: int) -> "Iterator[Mapper]":
    """A mapper whose workers load their model once, however often it is called for the same work."""
    from layerskip.workers.ray import RayWorkers

    with ExitStack() as stack:
        kept: dict[str, Any] = {}

        def map_items(items: Sequence[Any], make_worker: "Callable[[], Worker]") -> Iterator[Any]:
            if not items:
                return
            if kept.get("make_worker") != make_worker:
                stack.close()
                made = partial(_gathering, make_worker)
                workers = RayWorkers(made, num_workers=num_workers, use_gpus=use_gpus, most_items=most_items)
                kept.update(make_worker=make_worker, workers=stack.enter_context(workers))
            for _, results in kept["workers"].map(items):
                yield from results

        yield map_items


def _gathering(make_worker: "Callable[[], Worker]") -> Callable[[Any], list[Any]]:
    """A worker whose results of an item come together."""
    worker = make_worker()
    return lambda item: list(worker(item))
