"""Flags -> where the work of a command is done: in this process, or by workers on a Ray cluster."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from functools import partial
from typing import TYPE_CHECKING, Any

from layerskip.cli.flags.arguments import ModelArguments, OutputArguments
from layerskip.cli.flags.ray import RayArguments, anywhere
from layerskip.cli.terminal.terminal import load_model

if TYPE_CHECKING:
    from layerskip.workers.fan_out import Mapper


def model_loader(model: ModelArguments) -> Callable[[], Any]:
    """What loads the model quietly, once, in this process or in one that may work in another folder."""
    from layerskip.workers.fan_out import LoadOnce

    return LoadOnce(partial(load_model, anywhere(model), OutputArguments(json=True)))


def make_mapper(arguments: RayArguments, model: ModelArguments, most_items: int) -> AbstractContextManager["Mapper"]:
    """This process, or workers on a Ray cluster, no more than items; they stay until the context ends."""
    if not arguments.ray:
        from layerskip.workers.fan_out import in_process

        return nullcontext(in_process)

    from layerskip.workers.ray import ray_mapper

    return ray_mapper(num_workers=arguments.num_workers, use_gpus=model.device != "cpu", most_items=most_items)


def keep_output_clean(arguments: RayArguments) -> AbstractContextManager[object]:
    """Ray tells of workers that died on standard output, which is the JSON's."""
    return redirect_stdout(sys.stderr) if arguments.ray else nullcontext()
