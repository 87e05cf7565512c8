"""What a generation costs: every token runs through every layer once, and the early layers never twice."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from layerskip.decoding.engine import Committed
from layerskip.language_model import LanguageModel

LAYERS = 5
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.mark.parametrize("exit_layer", [1, 2, 4, 5])
@pytest.mark.parametrize("num_speculations", [1, 3, 4])
def test_a_round_of_k_drafts_costs_k_plus_1_times_e_and_the_rest_once(
    lm: LanguageModel,
    rounds_of: Callable[..., list[Committed]],
    layer_log: list[tuple[int, int, int]],
    exit_layer: int,
    num_speculations: int,
) -> None:
    options = {"exit_layer": exit_layer, "num_speculations": num_speculations, "max_new_tokens": 18}
    drafted = [event.num_drafted for event in rounds_of(lm, PROMPT, **options)]
    layer_log.clear()
    (result,) = lm.generate([PROMPT], **options)
    expected = [(layer, 1, len(PROMPT)) for layer in range(LAYERS)]
    if lm.decoder.compiled:  # a whole round drafts as many as it is made for, unless most of them would be in vain
        drafted = [k if 2 * k < num_speculations else num_speculations for k in drafted]
    for k in drafted:
        expected += [(layer, 1, 1) for _ in range(k + 1) for layer in range(exit_layer)]
        expected += [(layer, 1, k + 1) for layer in range(exit_layer, LAYERS)]
    assert layer_log == expected
    cost = LAYERS + sum((k + 1) * exit_layer + LAYERS - exit_layer for k in drafted)
    assert result.stats.layer_calls == cost == len(layer_log)
    assert result.stats.rounds == len(drafted)


@pytest.mark.parametrize("exit_layer", [None, 1, 3])
def test_plain_decoding_costs_its_depth_a_token(
    lm: LanguageModel, layer_log: list[tuple[int, int, int]], exit_layer: int | None
) -> None:
    depth = exit_layer or LAYERS
    options = {"generation_strategy": "autoregressive", "exit_layer": exit_layer, "max_new_tokens": 6}
    (result,) = lm.generate([PROMPT], **options)
    expected = [(layer, 1, len(PROMPT)) for layer in range(depth)]
    expected += [(layer, 1, 1) for _ in range(5) for layer in range(depth)]
    assert layer_log == expected
    assert result.stats.layer_calls == 6 * depth


def test_a_batch_enters_each_layer_once_for_all_rows(lm: LanguageModel, layer_log: list[tuple[int, int, int]]) -> None:
    prompts = [PROMPT, PROMPT[:3]]
    results = lm.generate(prompts, exit_layer=2, num_speculations=3, max_new_tokens=9)
    assert results[0].stats.layer_calls <= len(layer_log)
    assert max(result.stats.layer_calls for result in results) == len(layer_log)
    assert Counter(rows for _, rows, _ in layer_log)[2] > 0
    assert layer_log[0] == (0, 2, len(PROMPT))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True},
        {"do_sample": True, "acceptance": "rejection"},
        {"do_sample": True, "acceptance": "rejection", "block_verification": False},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 1},
    ],
    ids=str,
)
def test_with_all_layers_every_draft_holds(
    lm: LanguageModel, rounds_of: Callable[..., list[Committed]], options: dict[str, Any]
) -> None:
    """Draft and target are the same then, noise and contexts included, and a round drafts what may still be written."""
    rounds = rounds_of(lm, PROMPT, exit_layer=LAYERS, num_speculations=4, max_new_tokens=30, **options)
    assert [(event.num_drafted, event.num_accepted) for event in rounds] == [(4, 4)] * 5 + [(3, 3)]
