"""A session's cache grows between calls, and what it holds moves with it."""

from typing import Any

import pytest

import layerskip
from layerskip import language_model

OPTIONS = {"max_new_tokens": 12, "exit_layer": 2, "num_speculations": 3}


def test_the_cache_grows_up_to_the_context(tiny_checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model, "SESSION_TOKENS", 8)
    lm = layerskip.load(str(tiny_checkpoint()), dtype="float32", device="cpu")
    session, prompt, capacities = lm.new_session(), [5, 9, 11], [8]
    for turn in range(6):
        result = lm.stream([prompt], session=session, **OPTIONS).run()[0]
        assert result.token_ids == lm.generate([prompt], **OPTIONS)[0].token_ids
        assert result.stats.cached_tokens == (len(prompt) - 3 if turn else 0)  # all but the last token and two new ones
        capacities.append(session.engine.capacity)
        prompt = [*prompt, *result.token_ids, 7, 8]
    assert capacities == [8, 16, 32, 64, 64, 128, 128]
    assert session.engine.capacity == lm.decoder.max_context
