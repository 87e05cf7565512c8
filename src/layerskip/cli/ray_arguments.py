"""Flags that share work out over a Ray cluster."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from layerskip.checkpoint.names import MODELS
from layerskip.cli.arguments import ModelArguments, OutputArguments, Switch
from layerskip.cli.terminal import load_model
from layerskip.errors import InvalidArgumentError

if TYPE_CHECKING:
    from layerskip.evaluation.fan_out import Mapper, Worker

RAY_DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class RayArguments:
    """Where the work is done."""

    ray: Switch = False
    """Share the prompts out over a Ray cluster: that of RAY_ADDRESS, or one on this machine."""
    num_workers: Annotated[int | None, arg(metavar="N")] = None
    """Engines on the Ray cluster; one for each GPU if not given, or for each CPU core where there is none."""


def check_ray(arguments: RayArguments, model: ModelArguments) -> None:
    """Check what can be checked before anything is read.

    Raises:
        InvalidArgumentError: Flags that don't go together, a number below 1, or Ray is missing.
    """
    if not arguments.ray:
        if arguments.num_workers is not None:
            raise InvalidArgumentError("--num-workers is for --ray; add it, or leave both out")
        return
    if arguments.num_workers is not None and arguments.num_workers < 1:
        raise InvalidArgumentError(f"num_workers must be at least 1, got {arguments.num_workers}")
    if model.device not in RAY_DEVICES:
        raise InvalidArgumentError(
            f"device {model.device!r} can't be chosen with --ray, which gives each worker a GPU of its own; "
            f"use {', '.join(RAY_DEVICES)}"
        )

    from layerskip.interop.ray_map import import_ray

    import_ray()


def anywhere(model: ModelArguments) -> ModelArguments:
    """The same model, for a process that may work in another folder."""
    path = Path(model.model).expanduser()
    name = str(path.resolve()) if model.model not in ("demo", *MODELS) and path.exists() else model.model
    return replace(model, model=name, draft_text=None if model.draft_text is None else model.draft_text.resolve())


def model_loader(model: ModelArguments) -> Callable[[], Any]:
    """What loads the model quietly, once, in this process or in one that may work in another folder."""
    from layerskip.evaluation.fan_out import LoadOnce

    return LoadOnce(partial(load_model, anywhere(model), OutputArguments(json=True)))


def make_mapper(arguments: RayArguments, model: ModelArguments, most_items: int) -> AbstractContextManager["Mapper"]:
    """This process, or workers on a Ray cluster, no more than items; they stay until the context ends."""
    from layerskip.evaluation.fan_out import in_process

    if not arguments.ray:
        return nullcontext(in_process)
    return _on_cluster(arguments.num_workers, model.device != "cpu", most_items)


def keep_output_clean(arguments: RayArguments) -> AbstractContextManager[object]:
    """Ray tells of workers that died on standard output, which is the JSON's."""
    return redirect_stdout(sys.stderr) if arguments.ray else nullcontext()


@contextmanager
def _on_cluster(num_workers: int | None, use_gpus: bool, most_items: int) -> "Iterator[Mapper]":
    """A mapper whose workers load their model once, however often it is called for the same work."""
    from layerskip.interop.ray_map import RayWorkers

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
