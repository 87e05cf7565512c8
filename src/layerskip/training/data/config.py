"""Which data to train on and how to cut it into blocks: one frozen dataclass for Python and the command line."""

from collections.abc import Sequence
from dataclasses import dataclass

from layerskip.checks import whole_number
from layerskip.errors import InvalidArgumentError

MAX_HELD_OUT = 0.5


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data to train on and to evaluate with."""

    data: tuple[str, ...] = ()
    """python-stdlib, a text file, a folder of sources, records (.jsonl .json .csv .parquet), owner/name[:split]."""
    sequence_length: int = 256
    """Tokens in a block."""
    held_out: float = 0.02
    """Share of files kept out of training for evaluation, chosen by a hash of their content."""
    text_field: str | None = None
    """Field of a record with its text; if not given: messages, conversations, instruction, text, prompt, question."""
    suffixes: tuple[str, ...] = ()
    """Suffixes of the files to read from a folder, such as .py .md; the usual ones of sources and texts if not
    given."""
    streaming: bool = False
    """Read data while training, not all at the start: for data larger than memory."""
    max_documents: int | None = None
    """Most documents to read, held-out ones included; all if not given."""
    eval_tokens: int = 65536
    """Most held-out tokens read in an evaluation."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            InvalidArgumentError: Naming the field, its value and what is allowed.
        """
        object.__setattr__(self, "data", _strings("data", self.data))
        suffixes = _strings("suffixes", self.suffixes)
        object.__setattr__(self, "suffixes", tuple(_suffix(suffix) for suffix in suffixes))
        whole_number("sequence_length", self.sequence_length, least=2)
        whole_number("eval_tokens", self.eval_tokens, least=1)
        if self.max_documents is not None:
            whole_number("max_documents", self.max_documents, least=1)
        number = isinstance(self.held_out, int | float) and not isinstance(self.held_out, bool)
        if not number or not 0 <= self.held_out <= MAX_HELD_OUT:
            raise InvalidArgumentError(
                f"held_out must be a share from 0 to {MAX_HELD_OUT}, got {self.held_out!r}; 0.02 holds out 2%"
            )
        if self.text_field is not None and (not isinstance(self.text_field, str) or not self.text_field):
            raise InvalidArgumentError(
                f"text_field must be the name of a field, got {self.text_field!r}; or leave it out"
            )
        if not isinstance(self.streaming, bool):
            raise InvalidArgumentError(f"streaming must be True or False, got {self.streaming!r}")


def _strings(name: str, value: object) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else (None,)
    if not all(isinstance(text, str) and text for text in texts):
        raise InvalidArgumentError(f"{name} must be texts that aren't empty, got {value!r}")
    return tuple(str(text) for text in texts)


def _suffix(suffix: str) -> str:
    name = suffix.removeprefix("*").lower()
    if not name.strip(".") or "/" in name or "*" in name:
        raise InvalidArgumentError(f"suffixes must be endings of file names such as .py, got {suffix!r}")
    return name if name.startswith(".") else f".{name}"
