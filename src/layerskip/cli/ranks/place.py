"""Which of the ranks of a command this process is, by its environment; nothing here imports torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from layerskip.errors import InvalidArgumentError

COMMANDS = ("generate", "chat", "benchmark", "verify", "eval", "batch", "inspect")
"""Commands that several processes can run together. `train` has its own use of torchrun's environment."""
FOLDER = "LAYERSKIP_RANKS"
"""Variable: the folder through which ranks meet that `--tensor-parallel` has started."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """One rank among others."""

    rank: int
    num_ranks: int
    one_machine: bool
    """Whether all ranks are processes of this machine."""
    folder: str | None
    """Where they meet, if this package has started them."""

    @property
    def leads(self) -> bool:
        """Whether this is the process that talks to the user and writes files."""
        return self.rank == 0


@cache
def place() -> Place | None:
    """This process's place; None where it runs alone. What starts ranks is torchrun, or `launch.start_others`.

    Raises:
        InvalidArgumentError: The environment's numbers contradict each other.
    """
    return place_in(os.environ)


def place_in(environment: Mapping[str, str]) -> Place | None:
    """As `place`, of any environment."""
    if not {"RANK", "WORLD_SIZE"} <= set(environment):
        return None
    try:
        rank, num_ranks = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local = int(environment.get("LOCAL_WORLD_SIZE", num_ranks))
    except ValueError:
        rank, num_ranks, local = -1, 0, 0
    if not 0 <= rank < num_ranks:
        raise InvalidArgumentError(
            f"the environment says RANK {environment['RANK']!r} of WORLD_SIZE {environment['WORLD_SIZE']!r}; "
            "ranks count from 0: start them with torchrun, or unset both variables"
        )
    if num_ranks == 1:
        return None
    return Place(rank=rank, num_ranks=num_ranks, one_machine=local == num_ranks, folder=environment.get(FOLDER) or None)
