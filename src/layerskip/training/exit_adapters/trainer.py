"""transformers' `Trainer` for exit adapters."""

from typing import Any

from transformers import TrainerCallback

from layerskip.evaluation.inspect.exits import ExitQuality
from layerskip.evaluation.inspect.speedup import IdealSpeedup, ideal_speedup
from layerskip.training.exit_adapters.module import AdaptedModel
from layerskip.training.exit_adapters.statistics import AdapterStatistics
from layerskip.training.safe_trainer import SafeTrainer, exit_metrics


class AdapterTrainer(SafeTrainer):
    """Trains the adapters of an `AdaptedModel`; evaluation measures how well each predicts what the model predicts."""

    def __init__(self, model: AdaptedModel, args: Any, **kwargs: Any) -> None:
        """Take the adapters, and what `Trainer` takes."""
        super().__init__(model, args, **kwargs)
        self.adapted = model
        self.statistics = AdapterStatistics(model.exits)
        """Of the last evaluation."""
        self.evaluated_step: int | None = None
        """Optimizer steps done before that evaluation."""

    @property
    def exit_qualities(self) -> list[ExitQuality]:
        """Quality of every adapter in the last evaluation."""
        return self.statistics.qualities()

    @property
    def ideal_speedups(self) -> list[IdealSpeedup]:
        """Highest speedup that each adapter's agreement allows, where reading the weights is all that takes time."""
        return [
            ideal_speedup(
                quality.agreement,
                exit_layer=quality.exit_layer,
                num_layers=self.adapted.num_layers,
                head_cost=self.adapted.head_cost,
                draft_head_cost=1 + self.adapted.draft_head_cost,
            )
            for quality in self.exit_qualities
        ]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Transformers' evaluation, and agreement and ideal speedup of every adapter in the same pass."""
        self.adapted.statistics = self.statistics = AdapterStatistics(self.adapted.exits)
        try:
            metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            self.statistics.add_up_processes(self.accelerator)
        finally:
            self.adapted.statistics = None
        self.evaluated_step = self.state.global_step
        found = exit_metrics(f"{metric_key_prefix}_adapter", self.exit_qualities, self.ideal_speedups)
        if found:
            self.log(found)
        return {**metrics, **found}


class AdapterEvaluationCallback(TrainerCallback):
    """Reports the result of each evaluation."""

    def __init__(self, on_message: Any, exits: tuple[int, ...]) -> None:
        """Call `on_message` with one line for each evaluation."""
        self._on_message, self._exits = on_message, exits

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs = logs or {}
        if f"eval_adapter_{self._exits[0]}_agreement" not in logs:
            return
        parts = [
            f"{logs[f'eval_adapter_{exit_layer}_agreement']:.1%} at exit {exit_layer} "
            f"(ideal speedup {logs[f'eval_adapter_{exit_layer}_speedup']:.2f})"
            for exit_layer in self._exits
        ]
        self._on_message(f"step {state.global_step}: agreement with the last layer {', '.join(parts)}")
