"""Answers to lm-evaluation-harness's requests: kept as they come, found again, and what they cost."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import fsum
from typing import Any

from layerskip.evaluation.samples import SampleStore

WITHOUT_TOKENS = "scores_without_tokens"
"""Figure: continuations that have no token of their own, which count 0."""


@dataclass(kw_only=True)
class Answers:
    """Finished requests of one exit, kept in a store as they come."""

    exit_layer: int
    store: SampleStore
    asked: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What this run asked for, by key."""

    def key(self, kind: str, *parts: object) -> str:
        """A request's key: the same for the same request, whatever task it is from."""
        content = json.dumps([kind, *parts], sort_keys=True, default=str)
        return self.here(f"{kind}/{hashlib.sha256(content.encode()).hexdigest()[:32]}")

    def here(self, key: str) -> str:
        """The key of the same request at this exit."""
        return f"{self.exit_layer}/{'/'.join(key.split('/')[-2:])}"

    def find(self, key: str) -> bool:
        """Whether a request is finished."""
        if key not in self.asked and key in self.store.samples:
            self.asked[key] = self.store.samples[key]
        return key in self.asked

    def add(self, key: str, answer: Mapping[str, Any]) -> None:
        """Keep the answer of a request that has just finished."""
        record = {"kind": key.split("/")[1], "exit_layer": self.exit_layer, **answer}
        self.store.add(key, record)
        self.asked[key] = record

    def speed(self) -> dict[str, float]:
        """Figures of what this run asked for, whenever it was computed; those without a meaning are left out."""
        texts = [answer for answer in self.asked.values() if "text" in answer]
        scores = [answer for answer in self.asked.values() if "logprob" in answer]
        figures: dict[str, float] = {}
        if texts:
            tokens, rounds, drafted, accepted = (
                sum(text[name] for text in texts) for name in ("tokens", "rounds", "drafted", "accepted")
            )
            seconds = fsum(text["seconds"] for text in texts)  # exact, so that the order doesn't matter
            figures |= {"texts": len(texts), "tokens": tokens, "seconds": seconds}
            figures["tokens_per_second"] = tokens / max(seconds, 1e-9)
            if drafted:
                figures["acceptance_rate"] = accepted / drafted
                figures["mean_accepted_length"] = (tokens - len(texts)) / rounds
        if scores:
            tokens, seconds = sum(score["tokens_scored"] for score in scores), fsum(s["seconds"] for s in scores)
            figures |= {"scores": len(scores), "tokens_scored": tokens, "scoring_seconds": seconds}
            if empty := sum(score["tokens_scored"] == 0 for score in scores):
                figures[WITHOUT_TOKENS] = empty
            figures["tokens_scored_per_second"] = tokens / max(seconds, 1e-9)
        return figures
