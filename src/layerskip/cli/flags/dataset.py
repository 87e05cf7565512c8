"""Flags that name prompts to measure on, and the folder for results: shared by benchmark, sweep and verify."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from layerskip.cli.flags.arguments import File, ModelArguments, Text
from layerskip.cli.ranks.session import own_copy

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from layerskip.evaluation.data.datasets import Example
    from layerskip.evaluation.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class DatasetArguments:
    """Which prompts."""

    dataset: Annotated[str, arg(metavar="NAME")] = "human_eval"
    """cnn_dm_summarization, cnn_dm_lm, xsum_summarization, human_eval, top_v2, gsm8k, spec_bench, custom_jsonl or
    chat_format."""
    data_path: File = None
    """A local file of the same columns (.jsonl or .json), in place of the hub."""
    num_samples: Annotated[int | None, arg(metavar="N")] = None
    """Most prompts to use; all if not given."""
    n_shot: Annotated[int, arg(metavar="N")] = 0
    """Solved examples before each prompt."""
    template: Text = None
    """Text of a prompt, with columns in braces: 'Question: {question}\\nAnswer:'; the data set's own if not given."""
    shuffle_seed: Annotated[int | None, arg(metavar="SEED")] = None
    """Shuffle the prompts with this seed; in their order if not given."""


def load_examples(arguments: DatasetArguments) -> "list[Example]":
    """The examples that the flags name.

    Raises:
        InvalidArgumentError: Anything wrong with them; the message says what.
    """
    from layerskip.evaluation.data.datasets import load_examples

    return load_examples(
        arguments.dataset,
        data_path=arguments.data_path,
        num_samples=arguments.num_samples,
        n_shot=arguments.n_shot,
        template=arguments.template,
        shuffle_seed=arguments.shuffle_seed,
    )


def open_run(
    folder: Path, kind: str, model: ModelArguments, dataset: DatasetArguments, more: Mapping[str, Any]
) -> "AbstractContextManager[RunFolder]":
    """The folder of a run whose configuration is all of these flags; nobody else can write to it meanwhile.

    Raises:
        InvalidArgumentError: It holds another configuration's results.
    """
    from layerskip.evaluation.run_folder import open_run_folder

    return open_run_folder(own_copy(folder), kind, {**asdict(model), **asdict(dataset), **more})
