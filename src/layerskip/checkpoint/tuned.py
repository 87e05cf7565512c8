"""The setting that a sweep found best for a checkpoint, kept in a file beside it."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from layerskip.errors import CheckpointError, InvalidArgumentError
from layerskip.files import parse_json, to_json, write_atomically


@dataclass(frozen=True, kw_only=True)
class TunedSettings:
    """What self-speculative decoding takes where nothing is named, and what adaptive decoding starts from."""

    exit_layer: int
    num_speculations: int
    tokens_per_second: float
    """Measured with this exit and draft length, in the sweep."""
    speedup: float
    """Ratio to autoregressive decoding in the same sweep."""
    agreement: dict[int, float] = field(default_factory=dict)
    """By exit: share of tokens that it drafts right."""
    source: dict[str, Any] = field(default_factory=dict)
    """Data set, machine and date of the sweep."""


def read_tuned(file: Path, num_layers: int) -> TunedSettings | None:
    """The settings in a checkpoint's file; None where there is no such file.

    Args:
        file: `CheckpointFiles.tuned_file`.
        num_layers: Layers of the model.

    Raises:
        CheckpointError: The file can't be understood, or is another model's.
    """
    if not file.is_file():
        return None
    try:
        fields = parse_json(file.read_text(encoding="utf-8"))
        agreement = {int(exit_layer): float(share) for exit_layer, share in fields.pop("agreement", {}).items()}
        tuned = TunedSettings(agreement=agreement, **fields)
        fits = 1 <= tuned.exit_layer < num_layers and tuned.num_speculations >= 1
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is not what layerskip sweep --save writes ({error}); delete it") from error
    if not fits:
        raise CheckpointError(
            f"{file} names exit layer {tuned.exit_layer} and {tuned.num_speculations} drafts, and the model has "
            f"{num_layers} layers; delete it, or run layerskip sweep --save again"
        )
    return tuned


def write_tuned(file: Path, settings: TunedSettings) -> None:
    """Write the file.

    Raises:
        InvalidArgumentError: The folder can't be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, to_json(asdict(settings), indent=2) + "\n")
    except OSError as error:
        raise InvalidArgumentError(
            f"{file} can't be written ({error.strerror}); copy the checkpoint to a folder of yours first"
        ) from error
