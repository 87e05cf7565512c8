"""Exceptions that a user can cause; each message says what was given, what is allowed and what to do."""


class LayerSkipError(Exception):
    """Base class of all errors that this package raises on purpose."""


class InvalidArgumentError(LayerSkipError, ValueError):
    """An argument has a value that can't be used (a negative length, a NaN temperature, an exit layer beyond L)."""


class GrammarError(InvalidArgumentError):
    """A grammar for structured output can't be used: not understood, not supported, or beyond a limit."""


class ConstraintError(LayerSkipError):
    """A constraint can't go on along a text; the row that it belongs to ends, others don't notice."""


class PromptError(InvalidArgumentError):
    """A prompt is empty, isn't text or token ids, is refused by the chat template, or doesn't fit into the context."""


class PromptTooLongError(PromptError):
    """A prompt leaves no room for a new token in the model's context."""


class CheckpointError(LayerSkipError):
    """A checkpoint can't be found, read or understood."""


class CheckpointNotFoundError(CheckpointError):
    """No such folder and no such repository, or the hub can't be reached."""


class GatedRepositoryError(CheckpointError):
    """The repository exists, but the user has no access to it yet."""


class WeightsError(CheckpointError):
    """Weights are missing, truncated, of the wrong shape, or not in safetensors format."""


class TokenizerError(CheckpointError):
    """The checkpoint has no usable tokenizer, or no chat template where one is needed."""


class UnsupportedModelError(CheckpointError):
    """The model family, or a setting in its config.json that changes the computation, isn't implemented."""


class OutOfMemoryError(LayerSkipError, MemoryError):
    """There isn't enough free memory for the weights or the cache."""


class NotFiniteError(LayerSkipError, ArithmeticError):
    """The network's logits are infinite or NaN."""


class RankLostError(LayerSkipError, RuntimeError):
    """Another process that shares the network has died or failed."""


class TrainingError(LayerSkipError, RuntimeError):
    """Training can't continue: the loss isn't finite, or the data ran out."""


def brief(error: BaseException) -> str:
    """Another library's error message, shortened to one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-80:]}"
