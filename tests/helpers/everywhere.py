"""One text, however it is decoded."""

from typing import Any

from layerskip.language_model import LanguageModel


def same_everywhere(lm: LanguageModel, plain: LanguageModel, prompts: list[list[int]], **options: Any) -> int:
    """Compare all exits, lengths and adaptive decoding with plain autoregressive texts; returns accepted drafts."""
    options = {"max_new_tokens": 30, **options}
    expected = [r.token_ids for r in plain.generate(prompts, generation_strategy="autoregressive", **options)]
    accepted = 0
    for exit_layer in range(1, lm.decoder.num_layers + 1):
        for drafts in (1, 3, 6):
            results = lm.generate(prompts, exit_layer=exit_layer, num_speculations=drafts, **options)
            assert [r.token_ids for r in results] == expected, (exit_layer, drafts)
            accepted += sum(r.stats.accepted for r in results)
    assert [r.token_ids for r in lm.generate(prompts, generation_strategy="adaptive", **options)] == expected
    return accepted
