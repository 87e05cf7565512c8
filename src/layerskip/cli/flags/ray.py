"""Flags that share work out over a Ray cluster."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from layerskip.checkpoint.names import MODELS
from layerskip.cli.flags.arguments import ModelArguments, Switch
from layerskip.errors import InvalidArgumentError

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
    if model.tensor_parallel > 1:
        raise InvalidArgumentError("--ray and --tensor-parallel can't be combined; choose one")
    if arguments.num_workers is not None and arguments.num_workers < 1:
        raise InvalidArgumentError(f"num_workers must be at least 1, got {arguments.num_workers}")
    if model.device not in RAY_DEVICES:
        raise InvalidArgumentError(
            f"device {model.device!r} can't be chosen with --ray, which gives each worker a GPU of its own; "
            f"use {', '.join(RAY_DEVICES)}"
        )

    from layerskip.workers.ray import import_ray

    import_ray()


def anywhere(model: ModelArguments) -> ModelArguments:
    """The same model, for a process that may work in another folder."""
    path = Path(model.model).expanduser()
    name = str(path.resolve()) if model.model not in ("demo", *MODELS) and path.exists() else model.model
    adapters = model.exit_adapters
    return replace(
        model,
        model=name,
        draft_text=None if model.draft_text is None else model.draft_text.resolve(),
        exit_adapters=adapters if adapters in (None, "auto") else Path(adapters).expanduser().resolve(),
    )
