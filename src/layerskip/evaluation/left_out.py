"""Prompts that leave no room for an answer: left out of a measurement, counted and told, under their own numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from layerskip.errors import PromptError
from layerskip.evaluation.data.datasets import Example

LEFT_OUT = "left_out"


def left_out_key(example: Example) -> str:
    """Name of the sample that says why a prompt is left out."""
    return f"{LEFT_OUT}/{example.index}"


def left_out_sample(example: Example, error: PromptError) -> tuple[str, dict[str, Any]]:
    """Key and sample of a prompt that is left out because of an error."""
    return left_out_key(example), {"index": example.index, LEFT_OUT: str(error)}


def find_left_out(
    examples: Sequence[Example], samples: Mapping[str, Mapping[str, Any]]
) -> tuple[list[Example], list[dict[str, Any]]]:
    """Those that can be measured, and what `results.json` says of the others.

    Raises:
        PromptError: None can be measured.
    """
    kept = [example for example in examples if left_out_key(example) not in samples]
    others = [dict(samples[left_out_key(example)]) for example in examples if left_out_key(example) in samples]
    if not kept and others:
        raise PromptError(f"none of the {len(others)} prompts can be used; the first: {others[0][LEFT_OUT]}")
    return kept, [{"index": sample["index"], "reason": sample[LEFT_OUT]} for sample in others]


def describe_left_out(left_out: Sequence[Mapping[str, Any]], num_prompts: int) -> str:
    """What is told of prompts that were left out, in a line."""
    first = left_out[0]["reason"]
    return f"{len(left_out)} of {num_prompts} prompts were left out; the first: {first}"
