"""Tokens chosen from logits of which every rank has a part of the vocabulary; the logits stay where they are.

Every rank adds the noise of its own tokens, which depends on seed, position and token alone. Its best token, with the
score, is all that the others need. Filters need a little more: top-k the ranks' k best scores, top-p as many of the
best as make up the probability that is asked for.

Shapes: N ranks, B rows, Q positions a row, W tokens of this rank's part, M candidates of each rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from layerskip.model.choosing.noise import Purpose
from layerskip.model.choosing.sampling import add_noise, filter_by_rules, noise_for
from layerskip.model.draw import Draw
from layerskip.model.finite import NO_TOKEN
from layerskip.model.parallel.group import RankGroup

CANDIDATES = 64
"""Tokens of each rank that top-p looks at first; eight times as many where they don't make up the probability."""


class VocabularyPart:
    """One rank's part of the vocabulary (`sampling.Vocabulary`)."""

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

    def best(self, scores: Tensor) -> Tensor:
        """[..., W] -> [...], the token with the highest score of all."""
        return self._best_of(*scores.max(-1))[0]

    def softmax(self, scores: Tensor) -> Tensor:
        """[..., W] -> [..., W], this rank's part of the probabilities."""
        total = self.group.gather(scores.double().logsumexp(-1)).logsumexp(0)
        return (scores.double() - total.unsqueeze(-1)).exp().to(scores.dtype)

    def sum(self, values: Tensor) -> Tensor:
        """[..., W] -> [...], over all ranks' parts."""
        return self.group.gather(values.sum(-1)).sum(0)

    def at(self, values: Tensor, tokens: Tensor) -> Tensor:
        """Values of tokens [...], of which some rank has each."""
        places = tokens - self.tokens.start
        inside = (places >= 0) & (places < len(self.tokens))
        own = values.gather(-1, places.clamp(0, len(self.tokens) - 1).unsqueeze(-1)).squeeze(-1)
        return self.group.gather(own.masked_fill(~inside, 0.0)).sum(0)

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
        if not confident:
            return self.best(noisy), None
        best, places = noisy.max(-1)
        score = scores.gather(-1, places.unsqueeze(-1)).squeeze(-1)
        tokens, every, chosen = self._best_of(best, places, score, scores.logsumexp(-1))
        return tokens, (chosen[0] - every[1].logsumexp(0)).exp().float()

    def _best_of(self, best: Tensor, places: Tensor, *facts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best token of all, and what the ranks say beside it.

        Args:
            best: [...], the highest score of this rank's tokens.
            places: [...], that token's place among them.
            *facts: F numbers [...] of this rank.

        Returns:
            Token ids [...]; the ranks' facts [F, N, ...]; and those of the rank that has the best token, [F, ...].
        """
        own = [best, places + self.tokens.start, *facts]
        every = self.group.gather(torch.stack([number.double() for number in own])).transpose(0, 1)
        highest, rank = every[0].max(0)
        chosen = every.gather(1, rank.expand(len(own), 1, *rank.shape)).squeeze(1)
        return torch.where(highest.isfinite(), chosen[1].long(), NO_TOKEN), every[2:], chosen[2:]

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
