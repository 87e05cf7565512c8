"""Two models on the same text: exits side by side, and the drafts that each accepts."""

from collections.abc import Callable
from pathlib import Path

import pytest
from adapters import write_tiny_adapters

from layerskip import LanguageModel, load
from layerskip.errors import PromptError
from layerskip.evaluation.inspect.exits import measure_exits
from layerskip.evaluation.quantization import NEW_TOKENS, NUM_PROMPTS, compare, measure

TEXTS = [[(7 * i) % 90 + 3 for i in range(150)], [(11 * i) % 90 + 3 for i in range(40)]]


@pytest.fixture(scope="module")
def lm(tiny_checkpoint: Callable[..., Path]) -> LanguageModel:
    return load(str(tiny_checkpoint()), device="cpu")


def test_models_are_compared_exit_by_exit(lm: LanguageModel, tiny_checkpoint: Callable[..., Path]) -> None:
    other = load(str(tiny_checkpoint(seed=1)), device="cpu")
    comparison = compare(measure(lm, TEXTS), measure(other, TEXTS))
    assert comparison.num_tokens == 149 + 39
    assert [pair.exit_layer for pair in comparison.exits] == [1, 2, 3, 4]
    assert [pair.before for pair in comparison.exits] == measure_exits(lm, TEXTS).exits
    assert [pair.after for pair in comparison.exits] == measure_exits(other, TEXTS).exits
    assert all(pair.before.loss != pair.after.loss for pair in comparison.exits)


def test_drafts_are_counted_at_half_the_depth(lm: LanguageModel) -> None:
    drafts = measure(lm, TEXTS).drafts
    assert (drafts.exit_layer, drafts.num_speculations) == (2, 4)
    assert NUM_PROMPTS * NEW_TOKENS / 5 <= drafts.drafted <= NUM_PROMPTS * NEW_TOKENS * 4
    assert 0 <= drafts.accepted < 1


def test_drafts_are_counted_at_the_exit_of_an_adapter(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    adapters = write_tiny_adapters(tmp_path / "adapters", folder, [3], noise=0.0)
    drafts = measure(load(str(folder), device="cpu", exit_adapters=adapters), TEXTS).drafts
    assert drafts.exit_layer == 3


def test_a_text_shorter_than_a_prompt(lm: LanguageModel) -> None:
    assert measure(lm, [[3, 4, 5]]).drafts.drafted > 0
    with pytest.raises(PromptError):
        measure(lm, [[3]])
