"""Settings of a training run: frozen dataclasses that flags, TOML files and Python arguments are made from.

This module doesn't import torch, so that `--help` is fast.
"""

from dataclasses import dataclass, field
from typing import Literal

from layerskip.errors import InvalidArgumentError
from layerskip.training.data.config import DataConfig

Curriculum = Literal["rotational", "gradual", "all"]
"""rotational: every R-th exit, moving one layer each step; gradual: from the last exit down to the first; all: all
exits."""
DropoutSchedule = Literal["constant", "exponential"]
"""constant: the same rates throughout (continual pretraining, finetuning); exponential: rates that grow (from
scratch)."""
ExitLossName = Literal["ce", "kl", "lk"]
ExitWeights = Literal["depth", "equal"]
"""depth: weights that grow with the square of the depth, as in the paper; equal: one weight for all exits but the
last."""
DEFAULT_ROTATION = 8


def check_at_least(config: object, least: float, *names: str) -> None:
    """Raise `InvalidArgumentError` if a setting is given and below `least`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not least <= value < float("inf"):
            raise InvalidArgumentError(f"{name} must be a number from {least} on, got {value}")


@dataclass(frozen=True, kw_only=True)
class LayerSkipConfig:
    """The LayerSkip recipe: which layers samples skip, and which exits learn to predict. Source: arXiv:2404.16710."""

    dropout_max: float = 0.1
    """p_max: probability that a sample skips the last layer; earlier layers are skipped less often, the first one
    never."""
    dropout_schedule: DropoutSchedule | None = None
    """S(t). constant: for a trained model; exponential: grows from 0, from scratch. If not given, the one that fits."""
    exit_loss: ExitLossName = "ce"
    """Loss of the exits. ce: cross-entropy with the text (the paper); kl: KL from the last layer; lk: acceptance by the
    last layer."""
    exit_loss_scale: float = 0.2
    """e_scale: weight of the losses of exits before the last one; 0 switches them off."""
    exit_weights: ExitWeights = "depth"
    """e(l): growing with the square of the depth (the paper), or equal for all exits before the last one."""
    curriculum: Curriculum = "rotational"
    """Exits with a loss at a step: every R-th, moving one layer each step; gradually from the last to the first; or
    all."""
    rotation: int | None = None
    """R of the rotational curriculum, at most the number of exits; 8, or the number of exits, if not given."""
    exit_layers: tuple[int, ...] = ()
    """Exit layers with a loss, besides the last layer; all if not given. Name the exits that will draft."""
    stop_gradient: bool = False
    """Losses of exits train the layers below the exit only, not the shared norm and LM head."""

    def __post_init__(self) -> None:
        if not 0 <= self.dropout_max < 1:
            raise InvalidArgumentError(f"dropout_max must be at least 0 and below 1, got {self.dropout_max}")
        check_at_least(self, 0, "exit_loss_scale")
        check_at_least(self, 1, "rotation")
        if any(layers < 1 for layers in self.exit_layers) or len(set(self.exit_layers)) < len(self.exit_layers):
            raise InvalidArgumentError(f"exit_layers must be different numbers from 1 on, got {self.exit_layers}")

    def exits_for(self, num_layers: int) -> list[int]:
        """Exits that ever have a loss in a model of this many layers, counted from 0 and including the last.

        Naming exits is our addition to the paper: every exit with a loss takes capacity from the others, so an exit
        that will never draft makes the drafting ones worse.

        Raises:
            InvalidArgumentError: There is no such exit.
        """
        if max(self.exit_layers, default=0) > num_layers:
            raise InvalidArgumentError(
                f"exit_layers names {max(self.exit_layers)}, but the model has {num_layers} layers; give numbers from "
                f"1 to {num_layers}"
            )
        last = num_layers - 1
        return sorted({layers - 1 for layers in self.exit_layers or range(1, num_layers)} | {last})

    def rotation_for(self, num_layers: int) -> int:
        """R for a model of this many layers.

        Raises:
            InvalidArgumentError: R is larger than the number of exits that learn.
        """
        num_exits = len(self.exits_for(num_layers))
        if self.rotation is None:
            return min(DEFAULT_ROTATION, num_exits)
        if self.rotation > num_exits:
            whose = f"{num_exits} exits learn" if self.exit_layers else f"the model has {num_layers} layers"
            raise InvalidArgumentError(f"rotation is {self.rotation}, but {whose}; it must be from 1 to {num_exits}")
        return self.rotation


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """What training starts from: a trained model, or a shape with random weights."""

    model: str | None = None
    """A trained model to continue: demo, smollm2, gemma3-270m, a folder, a GGUF file, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository."""
    config: str | None = None
    """Train from scratch: small, medium, or the config.json of a causal model (a file, a folder, a hub id)."""
    tokenizer: str | None = None
    """Tokenizer of a model from scratch: a folder or hub id; if not given, one is trained on the data."""
    vocab_size: int | None = None
    """Vocabulary of the tokenizer that is trained; the configuration's vocabulary if not given."""
    lora_rank: int | None = None
    """Train LoRA adapters of this rank and freeze the model; they are merged into the weights at the end."""
    lora_alpha: int | None = None
    """Scale of the adapters; twice the rank if not given."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "lora_rank", "lora_alpha")
        if self.model is not None and (self.config or self.tokenizer or self.vocab_size):
            raise InvalidArgumentError(
                "config, tokenizer and vocab_size are for training from scratch; leave them out, or leave out model"
            )
        if self.config is None and self.lora_rank is not None and self.model is None:
            raise InvalidArgumentError("lora_rank needs a trained model to adapt; give it with model")
        if self.config is not None and self.lora_rank is not None:
            raise InvalidArgumentError("lora_rank adapts a trained model; with config all weights are trained")
        if self.tokenizer is not None and self.vocab_size is not None:
            raise InvalidArgumentError("vocab_size is for a tokenizer to be trained; give it or a tokenizer, not both")

    @property
    def from_scratch(self) -> bool:
        """Whether weights start at random."""
        return self.config is not None


@dataclass(frozen=True, kw_only=True)
class ExitAdapterConfig:
    """Exit adapters: the model stays as it is, and one more layer at an exit learns to predict what it predicts."""

    exit_adapters: tuple[int, ...] = ()
    """Exits that get an adapter; the model itself isn't trained then. Early ones draft faster, later ones better."""
    adapter_loss: ExitLossName = "kl"
    """Loss of the adapters. kl: from the last layer; lk: acceptance by the last layer; ce: cross-entropy with the
    text."""
    adapter_vocabulary: int | None = None
    """Adapters draft among this many of the data's most frequent tokens; 8192, or all if there are no more than twice
    as many. Fewer make drafts, and training, faster."""
    adapter_value_layers: int = 6
    """Adapters also read the values that this many layers keep of the last token that all layers have seen; 0: none."""
    cache_states: str | None = None
    """A folder to keep the model's states of the training data in: from the second pass over the data on, the model
    needn't run. It takes gigabytes, which are said at the start."""
    adapters_from: str | None = None
    """A folder with adapters of the same exits and tokens to go on from; if not given, they begin as copies of the last
    layer."""

    def __post_init__(self) -> None:
        exits = self.exit_adapters
        if any(exit_layer < 1 for exit_layer in exits) or len(set(exits)) < len(exits):
            raise InvalidArgumentError(f"exit_adapters must be different numbers from 1 on, got {exits}")
        check_at_least(self, 2, "adapter_vocabulary")
        check_at_least(self, 0, "adapter_value_layers")
        for name in ("adapter_vocabulary", "adapters_from", "cache_states"):
            if getattr(self, name) is not None and not exits:
                raise InvalidArgumentError(f"{name} is for training exit adapters; name their exits in exit_adapters")


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """How weights are updated."""

    max_steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 8
    """Blocks in a step for each process."""
    gradient_accumulation: int = 1
    """Batches whose gradients make one step."""
    learning_rate: float | None = None
    """Highest learning rate; if not given, 1e-3 for exit adapters, 8e-4 from scratch, 1e-4 for LoRA, 3e-5 for a trained
    model."""
    min_learning_rate: float = 0.1
    """Learning rate at the end, as a share of the highest; the rate falls along a cosine."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises; a twentieth of all steps, at most 2000, if not given."""
    weight_decay: float = 0.1
    """AdamW's weight decay."""
    adam_beta2: float = 0.95
    """AdamW's second beta."""
    max_grad_norm: float = 1.0
    """Largest norm of the gradients; longer ones are scaled down. 0 is no limit."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the computation (weights stay float32); auto: bfloat16 if the hardware has it and it is faster."""
    gradient_checkpointing: bool = False
    """Recompute activations instead of keeping them: less memory, a third more time."""
    compile: bool = False
    """torch.compile the model."""
    fsdp: bool = False
    """Shard the model over the processes (FSDP2) instead of copying it to each."""
    seed: int = 0
    """Seed of initial weights, order of data, and layer dropout."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "max_steps", "batch_size", "gradient_accumulation")
        check_at_least(self, 0, "warmup_steps", "weight_decay", "max_grad_norm", "min_learning_rate", "seed")
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise InvalidArgumentError(f"learning_rate must be above 0, got {self.learning_rate}")
        if not 0 <= self.adam_beta2 < 1:
            raise InvalidArgumentError(f"adam_beta2 must be at least 0 and below 1, got {self.adam_beta2}")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints, evaluations and logs."""

    save_steps: int = 500
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints that are kept; older ones are deleted."""
    eval_steps: int = 500
    """Steps between evaluations of every exit on the held-out data."""
    log_steps: int = 10
    """Steps between entries of the log."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the final weights; auto: the type of the model that training started from, or float32."""
    report_to: tuple[str, ...] = ()
    """Also log to these: tensorboard, wandb, or another integration of transformers."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "save_steps", "keep", "eval_steps", "log_steps")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """All settings that decide the result of a training run."""

    start: StartConfig = field(default_factory=StartConfig)
    data: DataConfig = field(default_factory=DataConfig)
    recipe: LayerSkipConfig = field(default_factory=LayerSkipConfig)
    adapters: ExitAdapterConfig = field(default_factory=ExitAdapterConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        if self.start.lora_rank is not None and self.optimization.fsdp:
            raise InvalidArgumentError("lora_rank and fsdp don't go together yet; leave one of them out")
        if self.adapters.exit_adapters:
            self._check_adapters()

    def _check_adapters(self) -> None:
        """Raise `InvalidArgumentError` where other settings contradict exit adapters."""
        start, optimization = self.start, self.optimization
        given = {"config": start.config, "lora_rank": start.lora_rank, "fsdp": optimization.fsdp or None}
        for name, value in given.items():
            if value is not None:
                raise InvalidArgumentError(
                    f"{name} and exit_adapters don't go together: adapters are trained for a model that stays as it is"
                )
