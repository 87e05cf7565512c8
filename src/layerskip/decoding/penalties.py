"""TEMPORARY"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Penalty = Callable[[Sequence[int], Tensor], Tensor]


def penalties_of(config) -> list[Penalty]:
    out = []
    if config.repetition_penalty != 1.0:
        from transformers import RepetitionPenaltyLogitsProcessor

        p = RepetitionPenaltyLogitsProcessor(penalty=float(config.repetition_penalty))
        out.append(lambda c, l, p=p: p(torch.tensor([list(c)], device=l.device), l.unsqueeze(0)).squeeze(0))
    if config.no_repeat_ngram_size > 0:
        from transformers import NoRepeatNGramLogitsProcessor

        q = NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size)
        out.append(lambda c, l, p=q: p(torch.tensor([list(c)], device=l.device), l.unsqueeze(0)).squeeze(0))
    return out
