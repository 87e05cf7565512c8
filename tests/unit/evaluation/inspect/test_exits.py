"""Loss and agreement of exits, against a computation from plain logits."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import layerskip
from layerskip.errors import PromptError
from layerskip.evaluation.inspect import exits
from layerskip.evaluation.inspect.exits import measure_exits


@pytest.fixture(scope="module")
def lm(tiny_checkpoint: Any) -> layerskip.LanguageModel:
    return layerskip.load(str(tiny_checkpoint()), dtype="float32", device="cpu")


def test_loss_and_agreement_are_those_of_the_logits(lm: layerskip.LanguageModel) -> None:
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 96, (size,), generator=generator).tolist() for size in (30, 17)]
    report = measure_exits(lm, texts)
    assert report.num_tokens == 29 + 16
    assert [e.exit_layer for e in report.exits] == [1, 2, 3, 4]
    for quality in report.exits:
        loss, agreed = 0.0, 0
        for text in texts:
            logits = lm.logits(text[:-1], exit_layer=quality.exit_layer)
            loss += F.cross_entropy(logits, torch.tensor(text[1:]), reduction="sum").item()
            agreed += int((logits.argmax(-1) == lm.logits(text[:-1]).argmax(-1)).sum())
        assert quality.loss == pytest.approx(loss / report.num_tokens, rel=1e-5)
        assert quality.agreement == pytest.approx(agreed / report.num_tokens)
    assert report.exits[-1].agreement == 1.0


def test_long_texts_are_cut_into_windows(lm: layerskip.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exits, "WINDOW", 8)
    seen: list[tuple[int, int | None]] = []
    report = measure_exits(lm, [list(range(20))], on_progress=lambda what, done, total: seen.append((done, total)))
    assert report.num_tokens == 19  # every token but the first is predicted once
    assert seen == [(8, 19), (16, 19), (19, 19)]


def test_a_text_without_two_tokens_is_refused(lm: layerskip.LanguageModel) -> None:
    with pytest.raises(PromptError, match="two tokens"):
        measure_exits(lm, [[3], []])


def test_the_embedded_model_was_made_for_early_exit() -> None:
    lm = layerskip.load("demo", dtype="float32", device="cpu")
    report = measure_exits(lm, lm.encode(["def add(a, b):\n    return a + b\n\n\nclass Stack:\n    pass\n" * 4]))
    assert report.trained_for_early_exit
    losses = [e.loss for e in report.exits]
    assert losses[0] > losses[7] > losses[15]
