"""Texts end at the first token at which plain decoding would end them."""

import torch
from transformers import EosTokenCriteria, MaxLengthCriteria

from layerskip.export.custom_generate.decoding import accept
from layerskip.export.custom_generate.rows import Rows
from layerskip.export.custom_generate.stopping import StopCheck


def test_drafts_are_accepted_up_to_the_first_mismatch() -> None:
    assert accept([4, 5, 6], [4, 5, 9, 7]) == [4, 5, 9]
    assert accept([4, 5], [4, 5, 6]) == [4, 5, 6]
    assert accept([4], [3, 5]) == [3]
    assert accept([], [3]) == [3]


def test_end_tokens_and_lengths_cut() -> None:
    rows = Rows(torch.tensor([[1, 2, 3]]), [0], 20)
    check = StopCheck([MaxLengthCriteria(8), EosTokenCriteria(torch.tensor([7, 9]))], rows)
    assert check.count(0, [4, 5, 6]) == (3, False)
    assert check.count(0, [4, 9, 7]) == (2, True)
    assert check.count(0, [4, 5, 4, 5, 4, 5]) == (5, True)


def test_other_criteria_see_the_text_up_to_each_token() -> None:
    seen = []

    def criterion(ids: torch.Tensor, scores: object) -> torch.Tensor:
        seen.append(ids.tolist())
        return torch.tensor([int(ids[0, -1]) == 5])

    rows = Rows(torch.tensor([[1, 2, 3]]), [0], 20)
    rows.write(0, torch.tensor([[4, 5, 6]]))
    assert StopCheck([criterion], rows).count(0, [4, 5, 6]) == (2, True)
    assert seen == [[[1, 2, 3, 4]], [[1, 2, 3, 4, 5]]]
