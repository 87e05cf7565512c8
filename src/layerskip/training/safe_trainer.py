"""transformers' `Trainer` that loses nothing: checkpoints are complete or absent, and NaN ends the run."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy

from layerskip.errors import InvalidArgumentError, TrainingError
from layerskip.evaluation.inspect.exits import ExitQuality
from layerskip.evaluation.inspect.speedup import IdealSpeedup
from layerskip.training.callbacks import AlreadyFinished, FinishedCallback, InterruptCallback, LogCallback
from layerskip.training.data.block_datasets import BlockDataset
from layerskip.training.data.corpus import Corpus
from layerskip.training.output.checkpoints import (
    STAGING,
    delete,
    last_intact,
    list_checkpoints,
    move_into_place,
    writing,
)


class SafeTrainer(Trainer):
    """Writes checkpoints atomically, stops at losses and weights that aren't finite, and evaluates on all data."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what `Trainer` takes."""
        super().__init__(*args, **kwargs)
        self._staging: Path | None = None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Compute the loss and gradients of one batch.

        Raises:
            TrainingError: The loss isn't a finite number.
        """
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        finite = torch.isfinite(loss).float()
        if self.args.world_size > 1:  # so all processes stop together
            finite = self.accelerator.reduce(finite, reduction="sum") == self.args.world_size
        if not finite:
            raise self._diverged(f"the loss at step {self.state.global_step + 1} is {loss.item()}")
        return loss

    def _diverged(self, what: str) -> TrainingError:
        kept = list_checkpoints(Path(str(self.args.output_dir)))
        rest = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was written yet"
        return TrainingError(
            f"{what}, so training has stopped; {rest}. "
            "A lower learning rate, a longer warmup or a higher precision usually helps"
        )

    def _check_weights(self) -> None:
        """Never save NaN or infinite weights: a bad gradient can corrupt them while the loss is still finite."""
        finite = torch.ones((), device=self.args.device)
        model: Any = self.model
        for weight in model.parameters():
            local = weight.to_local() if isinstance(weight, DTensor) else weight
            finite *= torch.isfinite(local.detach()).all()
        if self.args.world_size > 1:
            finite = self.accelerator.reduce(finite, reduction="sum") == self.args.world_size
        if not finite:
            raise self._diverged(f"weights after step {self.state.global_step} aren't finite numbers")

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Batches of all held-out data, including an incomplete last batch (which training drops)."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint in a temporary folder and move it into place when it is complete."""
        self._check_weights()
        output = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        saves = self.args.should_save
        with writing(output, name) if saves else nullcontext(output / STAGING) as staging:
            self.accelerator.wait_for_everyone()
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self.accelerator.wait_for_everyone()
            if self.state.best_model_checkpoint == str(staging / name):
                self.state.best_model_checkpoint = str(output / name)
                if saves:
                    self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
            if saves:
                move_into_place(staging / name, output / name)
                self._delete_old_checkpoints(output)
        self.accelerator.wait_for_everyone()

    def _delete_old_checkpoints(self, output: Path) -> None:
        limit = self.args.save_total_limit
        if limit:
            for path in list_checkpoints(output)[:-limit]:
                if str(path) != self.state.best_model_checkpoint:
                    delete(path)


def choose_held_out(arguments: TrainingArguments, corpus: Corpus) -> Any:
    """The data to evaluate on; without any, None, and the arguments ask for no evaluation.

    Raises:
        InvalidArgumentError: The data to train on doesn't fill a batch of all processes.
    """
    held_out: Any = corpus.held_out
    whole = arguments.per_device_eval_batch_size * arguments.world_size
    if isinstance(corpus.train, BlockDataset) and len(corpus.train) < whole:
        raise InvalidArgumentError(
            f"the data gives {len(corpus.train)} blocks to train on, and a batch of all processes has {whole}; "
            "add data, or lower batch_size or sequence_length"
        )
    if arguments.world_size > 1 and len(held_out) > whole:  # processes get whole batches, so nothing is counted twice
        held_out = torch.utils.data.Subset(held_out, range(len(held_out) // whole * whole))
    if not len(held_out):  # the held-out share was too small for any text
        arguments.eval_strategy = IntervalStrategy.NO
        return None
    return held_out


def exit_metrics(prefix: str, qualities: Sequence[ExitQuality], ideals: Sequence[IdealSpeedup]) -> dict[str, float]:
    """What an evaluation logs of each exit; names begin with `prefix` and the exit."""
    found = {}
    for quality, ideal in zip(qualities, ideals, strict=True):
        name = f"{prefix}_{quality.exit_layer}"
        found[f"{name}_loss"] = quality.loss
        found[f"{name}_agreement"] = quality.agreement
        found[f"{name}_speedup"] = ideal.speedup
    return found


def run_trainer(trainer: SafeTrainer, output: Path, say: Callable[[str], None]) -> None:
    """Run the remaining steps, from the last intact checkpoint if there is one."""
    checkpoint = last_intact(output, say)
    interrupt = InterruptCallback(trainer)
    for callback in (LogCallback(output), interrupt, FinishedCallback()):
        trainer.add_callback(callback)
    set_seed(trainer.args.seed)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except AlreadyFinished:
        pass
    finally:
        interrupt.restore()
