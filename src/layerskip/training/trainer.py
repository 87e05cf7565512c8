"""transformers' `Trainer` with the LayerSkip recipe.

from layerskip import LayerSkipConfig, LayerSkipTrainer

trainer = LayerSkipTrainer(model, args, layerskip=LayerSkipConfig(dropout_max=0.1), train_dataset=..., eval_dataset=...)
trainer.train()
"""

from dataclasses import asdict
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn

from layerskip.evaluation.inspect.exits import ExitQuality
from layerskip.evaluation.inspect.speedup import IdealSpeedup, ideal_speedup
from layerskip.training.config import LayerSkipConfig
from layerskip.training.output.saved_config import make_saveable
from layerskip.training.recipe.recipe import LayerSkipRecipe
from layerskip.training.safe_trainer import SafeTrainer, exit_metrics


class LayerSkipTrainer(SafeTrainer):
    """A `Trainer` that applies the LayerSkip recipe.

    Everything else is transformers': gradient accumulation, mixed precision, checkpointing, FSDP, LoRA, logging.
    Evaluation adds the quality of every exit; checkpoints name the recipe in config.json.
    """

    def __init__(self, model: Any = None, args: Any = None, *, layerskip: LayerSkipConfig, **kwargs: Any) -> None:
        """Attach the recipe to a model.

        Args:
            model: A causal model of transformers, bare or with peft's adapters.
            args: `TrainingArguments`.
            layerskip: The recipe.
            **kwargs: What `Trainer` takes.

        Raises:
            UnsupportedModelError: The model's layers, norm or head can't be reached.
            InvalidArgumentError: The rotation is larger than the number of layers.
        """
        super().__init__(model, args, **kwargs)
        assert self.model is not None
        self.recipe = LayerSkipRecipe(self.model, layerskip, seed=self.args.seed)
        make_saveable(self.recipe.model)
        self.recipe.model.config.layerskip = {**asdict(layerskip), "rotation": self.recipe.rotation}
        self.exit_qualities: list[ExitQuality] = []
        """Quality of every exit in the last evaluation."""
        self.evaluated_step: int | None = None
        """Optimizer steps done before that evaluation."""
        self._begun = -1

    def create_accelerator_and_postprocess(self) -> None:
        """Shard on CPUs too, where accelerate would copy the whole model to every process without a warning."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.args.fsdp and state.distributed_type == DistributedType.MULTI_CPU:
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            # Both classes share their state between instances, and the second one copies the state of the first.
            PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Compute the loss and gradients of one batch.

        Raises:
            TrainingError: The loss isn't a finite number.
        """
        step = self.state.global_step
        if step != self._begun:
            groups = self.get_tp_size() * self.get_cp_size() * self.get_sp_size()  # processes that share a batch
            self.recipe.begin_step(
                step,
                self.state.max_steps,
                rank=self.args.process_index // groups,
                world_size=self.args.world_size // groups,
            )
            self._begun = step
        return super().training_step(model, inputs, *args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Transformers' evaluation, and loss, agreement and ideal speedup of every exit in the same pass."""
        with self.recipe.measure() as statistics:
            metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            statistics.add_up_processes(self.accelerator)
        self.exit_qualities, self.evaluated_step = statistics.qualities(), self.state.global_step
        found = exit_metrics(f"{metric_key_prefix}_exit", self.exit_qualities, self.ideal_speedups)
        if found:
            self.log(found)
        return {**metrics, **found}

    @property
    def ideal_speedups(self) -> list[IdealSpeedup]:
        """Highest speedup of self-speculative decoding at each exit, from the last evaluation."""
        recipe = self.recipe
        return [
            ideal_speedup(
                quality.agreement,
                exit_layer=quality.exit_layer,
                num_layers=recipe.num_layers,
                head_cost=recipe.head_cost,
            )
            for quality in self.exit_qualities
        ]
