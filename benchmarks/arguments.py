"""Options that several benchmarks share."""

from dataclasses import dataclass
from pathlib import Path

from models import ModelName


@dataclass(frozen=True, kw_only=True)
class PromptArguments:
    """Options of a benchmark that generates after prompts."""

    model: ModelName = "demo"
    max_new_tokens: int = 64
    """Tokens to generate after each prompt."""
    prompts: Path = Path(__file__).parent / "prompts.jsonl"
    """JSON lines with a field `prompt`; a model without a tokenizer gets random tokens instead."""
    num_prompts: int = 4
    repetitions: int = 5
    threads: int = 2


@dataclass(frozen=True, kw_only=True)
class DraftingArguments(PromptArguments):
    """Options of a benchmark with one fixed exit layer and draft length."""

    exit_layer: int = 4
    num_speculations: int = 4
    agreement: float = 0.9
    """Share of random tokens on which a synthetic model's exit agrees with its last layer."""
