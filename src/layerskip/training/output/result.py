"""The result of a training run."""

from dataclasses import dataclass

from layerskip.evaluation.inspect.exits import ExitQuality
from layerskip.evaluation.inspect.speedup import IdealSpeedup
from layerskip.training.data.packing import LongExamples
from layerskip.training.precision import Precision


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """The result of a run."""

    output: str
    """Folder of the run; a checkpoint in Hugging Face's format, or exit adapters, unless the run was interrupted."""
    interrupted: bool
    """Whether the run was stopped before its last step; it can be resumed."""
    step: int
    """Optimizer steps done."""
    num_tokens: int
    """Tokens in those steps, in all processes."""
    train_loss: float | None
    """Nats: J at the last log entry."""
    loss: float | None
    """Nats: the last layer's loss on the held-out data; None if nothing was held out."""
    exits: list[ExitQuality]
    """Quality of every exit on the held-out data; of exit adapters, theirs."""
    speedups: list[IdealSpeedup]
    """Highest speedup that the agreement of each of `exits` allows."""
    long_examples: LongExamples
    """Counts of prompts with completions and of conversations that are longer than a block; with streaming, of those
    read."""
    precision: Precision
    """Precision of the computation."""
    seconds: float
    """Seconds since this run started or resumed, everything included."""
