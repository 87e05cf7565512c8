"""Tokens chosen from logits of which every rank has a part of the vocabulary; the logits stay where they are.

Every rank adds the noise of its own tokens, which depends on seed, position and token alone. Its best token, with the
score, is all that the others need. Filters need a little more: top-k the ranks' k best scores, top-p as many of the
best as make up the probability that is asked for.

Shapes: N ranks, B rows, Q positions a row, W tokens of this rank's part, M candidates of each rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from layerskip.model.draw import Draw
from layerskip.model.finite import NO_TOKEN
from layerskip.model.noise import Purpose
from layerskip.model.parallel.group import RankGroup
from layerskip.model.sampling import add_noise, filter_by_rules, noise_for

CANDIDATES = 64
"""Tokens of each rank that top-p looks at first; eight times as many where they don't make up the probability."""


class VocabularyPart:
    """One rank's part of the vocabulary."""

    def __init__(self, group: RankGroup, tokens: range) -> None:
        """Take the part.

        Args:
            group: The ranks.
            tokens: W token ids.
        """
        self.group, self.tokens = group, tokens

    def whole(self, logits: Tensor, sizes: Sequence[int]) -> Tensor:
        """[B, Q, W] -> [B, Q, V], the logits of all ranks; `sizes` are the lengths of their parts."""
        widest = max(sizes)
        padded = torch.nn.functional.pad(logits, (0, widest - logits.shape[-1]))
        parts = self.group.gather(padded)
        return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], -1)

    def filter(self, draw: Draw | None, logits: Tensor) -> Tensor:
        """As `sampling.filter_scores`, by what the whole vocabulary's scores say."""
        return logits if draw is None else filter_by_rules(draw, logits, self._filter)

    def choose(
        self, scores: Tensor, draw: Draw | None, first: Sequence[int], *, confident: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The best token of all, or one that is drawn.

        Args:
            scores: [B, Q, W], filtered.
            draw: The rules; without them, the most likely token is taken everywhere.
            first: Position of each row's first token to choose; the others follow.
            confident: Also return the chosen tokens' probabilities.

        Returns:
            [B, Q] token ids, `NO_TOKEN` where no score is a finite number; and [B, Q] probabilities or None.
        """
        noisy = scores
        if draw is not None and any(draw.temperatures):
            noise = noise_for(draw, scores, first, Purpose.TARGET, None, start=self.tokens.start)
            noisy = add_noise(scores, noise, draw)
        best, places = noisy.max(-1)
        facts = [best.double(), (places + self.tokens.start).double()]
        if confident:
            facts += [scores.gather(-1, places.unsqueeze(-1)).squeeze(-1).double(), scores.double().logsumexp(-1)]
        every = self.group.gather(torch.stack(facts))  # [N, 2 or 4, B, Q]
        highest, rank = every[:, 0].max(0)
        index = rank.unsqueeze(0)
        tokens = every[:, 1].gather(0, index).squeeze(0).long()
        tokens = torch.where(highest.isfinite(), tokens, NO_TOKEN)
        if not confident:
            return tokens, None
        chosen = every[:, 2].gather(0, index).squeeze(0)
        return tokens, (chosen - every[:, 3].logsumexp(0)).exp().float()

    def _filter(self, logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
        """[positions, W] by one set of rules; returns a new tensor."""
        if temperature == 0:
            return logits.clone()
        scores = logits / temperature
        if top_k > 0:
            best = self._best(scores, top_k)
            last = min(top_k, best.shape[-1]) - 1
            scores.masked_fill_(scores < best[:, last : last + 1], -torch.inf)
        if top_p < 1:
            scores.masked_fill_(scores < self._least_of_nucleus(scores, top_p), -torch.inf)
        if min_p > 0:
            highest = self.group.gather(scores.amax(-1, keepdim=True)).amax(0)
            scores.masked_fill_((scores - highest).exp() < min_p, -torch.inf)
        return scores

    def _best(self, scores: Tensor, count: int) -> Tensor:
        """[positions, at most `count`], the best scores of all ranks in descending order."""
        widest = int(self.group.gather(torch.tensor([scores.shape[-1]], device=scores.device)).max())
        count = min(count, widest)
        own = scores.topk(min(count, scores.shape[-1])).values
        own = torch.nn.functional.pad(own, (0, count - own.shape[-1]), value=-torch.inf)
        every = self.group.gather(own).permute(1, 0, 2).flatten(1)
        return every.sort(descending=True).values

    def _least_of_nucleus(self, scores: Tensor, top_p: float) -> Tensor:
        """[positions, 1], the lowest score among the likeliest tokens that make up the probability `top_p`."""
        total = self.group.gather(scores.double().logsumexp(-1)).logsumexp(0).unsqueeze(-1)
        count = CANDIDATES
        while True:
            best = self._best(scores, count)
            probs = (best - total).exp()
            before = probs.cumsum(-1) - probs
            complete = best.shape[-1] < count * self.group.size
            if complete or bool((before[:, min(count, best.shape[-1]) - 1] >= top_p).all()):
                break
            count *= 8
        kept = (before < top_p).sum(-1, keepdim=True).clamp(min=1)
        return best.gather(-1, kept - 1).to(scores.dtype)
