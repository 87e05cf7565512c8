"""Replayed rounds are those that decoding takes, for every exit and draft length."""

from typing import Any

import pytest

from layerskip.decoding.config import GenerationConfig
from layerskip.evaluation.setting import Setting
from layerskip.evaluation.sweep.trajectories import record_trajectory, replay
from layerskip.language_model import LanguageModel


@pytest.mark.parametrize("max_new_tokens", [1, 2, 40])
def test_replays_are_exact(lm: LanguageModel, prompts: list[list[int]], max_new_tokens: int) -> None:
    exits = range(1, lm.decoder.num_layers)
    plain = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False)
    accepted = 0
    for prompt in prompts:
        text = record_trajectory(lm, prompt, exits, plain).token_ids
        for ends in ((), text[len(text) // 2 :][:1]):
            config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_ids=ends)
            trajectory = record_trajectory(lm, prompt, exits, config)
            for exit_layer in exits:
                for length in (1, 4):
                    stats = decode(lm, prompt, config, exit_layer=exit_layer, num_speculations=length).stats
                    found = replay(trajectory, Setting(exit_layer, length))
                    assert (found.drafted, found.accepted) == (stats.drafted, stats.accepted)
                    assert sum(found.rounds.values()) == stats.rounds
                    accepted += found.accepted
    assert accepted > 0 or max_new_tokens <= 2


def test_texts_that_fill_the_context(lm: LanguageModel) -> None:
    config = GenerationConfig(max_new_tokens=500, do_sample=False)
    trajectory = record_trajectory(lm, [5, 6, 7], [2], config)
    assert len(trajectory.token_ids) == lm.decoder.max_context - 3
    stats = decode(lm, [5, 6, 7], config, exit_layer=2, num_speculations=6).stats
    found = replay(trajectory, Setting(2, 6))
    assert (found.drafted, found.accepted, sum(found.rounds.values())) == (stats.drafted, stats.accepted, stats.rounds)


def test_trajectories_are_the_text(lm: LanguageModel, prompts: list[list[int]]) -> None:
    config = GenerationConfig(max_new_tokens=30, do_sample=False)
    depth = lm.decoder.num_layers
    for prompt in prompts:
        trajectory = record_trajectory(lm, prompt, range(1, depth + 1), config)
        assert list(trajectory.token_ids) == decode(lm, prompt, config, generation_strategy="autoregressive").token_ids
        assert all(len(found) == len(trajectory.token_ids) for found in trajectory.agreement.values())
        assert all(trajectory.agreement[depth])  # the last layer always agrees with itself
        assert 0 < trajectory.prompt_seconds <= trajectory.seconds


def decode(lm: LanguageModel, prompt: list[int], config: GenerationConfig, **options: Any) -> Any:
    return lm.generate([prompt], config, **options)[0]
