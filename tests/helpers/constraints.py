"""Constraints without a grammar library: what they allow is drawn from a hash of all tokens before."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.rules.constraint import TokenBits
from layerskip.decoding.sampler import Sampler
from layerskip.errors import ConstraintError
from layerskip.language_model import LanguageModel


class Maze:
    """Allows one token, a few or most, depending on every token before; counts what the engine asks."""

    def __init__(
        self,
        seed: int,
        vocab: int,
        *,
        length: int = 10**9,
        forced: float = 0.4,
        ending: float = 0.0,
        fails: int | None = None,
        forcing: Sequence[int] = (),
    ) -> None:
        """Set the rules.

        Args:
            seed: Of what is allowed.
            vocab: V.
            length: Tokens after which the text is complete.
            forced: Share of places with a single allowed token.
            ending: Share of places where the text may end.
            fails: Tokens after which nothing can be said any more.
            forcing: The only tokens that are allowed, one after the other, at the beginning.
        """
        self.seed, self.vocab, self.length, self.forced, self.ending = seed, vocab, length, forced, ending
        self.fails, self.forcing = fails, forcing
        self.tokens: list[int] = []
        self.rolled_back = 0

    def fresh(self) -> "Maze":
        """The same before its first token."""
        names = ("seed", "vocab", "length", "forced", "ending", "fails", "forcing")
        return Maze(**{name: getattr(self, name) for name in names})

    def allowed(self) -> tuple[list[int], bool]:
        """Tokens that may come next, and whether the text may end."""
        if self.fails is not None and len(self.tokens) >= self.fails:
            raise ConstraintError(f"nothing can be said after {self.fails} tokens")
        if len(self.tokens) >= self.length:
            return [], True
        if len(self.tokens) < len(self.forcing):
            return [self.forcing[len(self.tokens)]], False
        pick = random.Random(f"{self.seed}:{self.tokens}")
        share = pick.choice([0.1, 0.5, 0.9])
        tokens = [token for token in range(self.vocab) if pick.random() < share] or [pick.randrange(self.vocab)]
        if pick.random() < self.forced:
            tokens = tokens[:1]
        return tokens, pick.random() < self.ending

    def fill(self, bits: TokenBits) -> bool:
        tokens, may_end = self.allowed()
        chosen = np.zeros(32 * len(bits), np.uint8)
        chosen[tokens] = 1
        bits[:] = np.packbits(chosen, bitorder="little").view(np.int32)
        return may_end

    def advance(self, token: int) -> None:
        assert token in self.allowed()[0], "the engine tried a token that isn't allowed"
        self.tokens.append(token)

    def rollback(self, count: int) -> None:
        assert 0 < count <= len(self.tokens)
        self.rolled_back += count
        del self.tokens[-count:]


def decode_slowly(lm: LanguageModel, prompt: Sequence[int], maze: Maze, **options: Any) -> tuple[list[int], str]:
    """Tokens and the reason of the end: decoding without cache, drafts or engine."""
    config = GenerationConfig(**options)
    sampler = Sampler([config], [config.seed or 0], prompt_lengths=[len(prompt)])
    ends = config.eos_token_ids or ()
    maze, tokens = maze.fresh(), list(prompt)
    while True:
        allowed, may_end = maze.allowed()
        usable = [token for token in allowed if token not in ends]
        written = tokens[len(prompt) :]
        if written and not usable and may_end:
            return written, "stop"
        if len(written) == config.max_new_tokens:
            return written, "length"
        usable += list(ends) if may_end else []
        if not usable:
            return written, "error"
        plain = GenerationConfig(**{**options, "do_sample": False, "temperature": None, "top_k": 0, "top_p": 1.0})
        adjusted = Sampler([plain], [0], prompt_lengths=[len(prompt)]).scores(lm.logits(tokens)[None, -1:], [[tokens]])
        masked = torch.full_like(adjusted, -torch.inf)
        masked[..., usable] = adjusted[..., usable]
        scores = Sampler([GenerationConfig(**_draws_of(options))], [config.seed or 0]).scores(masked)
        tokens.append(int(sampler.choose(scores, [len(tokens)])))
        if tokens[-1] in ends:
            return tokens[len(prompt) :], "stop"
        maze.advance(tokens[-1])


def _draws_of(options: dict[str, Any]) -> dict[str, Any]:
    """The options of sampling alone."""
    return {name: options[name] for name in ("do_sample", "temperature", "top_k", "top_p", "min_p") if name in options}
