"""Bodies of answers: usage, metrics, and what a round says of its drafts."""

import json
from collections.abc import Sequence
from typing import Any

from layerskip.decoding.output.events import GenerationResult
from layerskip.decoding.stats import GenerationStats
from layerskip.serving.ticket import RoundPiece

FINISH_REASONS = {"stop": "stop", "length": "length", "interrupted": "abort"}
DONE = b"data: [DONE]\n\n"


def sse(body: Any) -> bytes:
    """One server-sent event, in ASCII."""
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n".encode()


def usage(results: Sequence[GenerationResult], num_choices: int = 1, *, dropped: int = 0) -> dict[str, Any]:
    """Tokens of a request; a prompt counts once, whatever the number of its answers.

    Args:
        results: Of all texts, those of one prompt one after the other.
        num_choices: Texts of each prompt.
        dropped: Generated tokens of each text that aren't given to the client.
    """
    firsts = [result.stats for result in results[::num_choices]]
    prompt = sum(stats.prompt_tokens for stats in firsts)
    generated = sum(len(result.token_ids) - dropped for result in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(stats.cached_tokens for stats in firsts)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
            "reasoning_tokens": 0,
        },
    }


def metrics(results: Sequence[GenerationResult]) -> dict[str, Any]:
    """What drafts were worth, in vLLM's shape, and times."""
    stats = [result.stats for result in results]
    drafted, accepted = (
        _summed([s.drafted_by_position for s in stats]),
        _summed([s.accepted_by_position for s in stats]),
    )
    rounds = drafted[0] if drafted else 0
    return {
        "speculative_decoding": {
            "num_drafts": rounds,
            "num_draft_tokens": sum(drafted),
            "num_accepted_tokens": sum(accepted),
            "mean_acceptance_length": 1 + sum(accepted) / rounds if rounds else 1.0,
            "draft_acceptance_rate": sum(accepted) / sum(drafted) if sum(drafted) else 0.0,
            "acceptance_histogram": accepted,
            "draft_histogram": drafted,
        },
        "time_to_first_token_seconds": stats[0].time_to_first_token_s,
        "seconds": max(s.seconds for s in stats),
        "tokens_per_second": decoding_speed(stats),
        "cached_tokens": sum(s.cached_tokens for s in stats),
    }


def decoding_speed(stats: Sequence[GenerationStats]) -> float:
    """Tokens/s after the first token, of all texts of a request together."""
    tokens = sum(s.tokens - 1 for s in stats)
    seconds = max(s.seconds - s.time_to_first_token_s for s in stats)
    return tokens / seconds if seconds > 0 else 0.0


def speculation(piece: RoundPiece) -> dict[str, Any]:
    """What happened in a round, for clients that show it."""
    return {
        "index": piece.place,
        "drafter": piece.drafter if piece.drafts else None,
        "exit_layer": piece.exit_layer if piece.drafts else 0,
        "drafts": [{"id": i, "text": text} for i, text in zip(piece.drafts, piece.draft_texts, strict=True)],
        "num_accepted": piece.num_accepted,
        "tokens": [{"id": token.token_id, "text": token.text, "source": token.source} for token in piece.tokens],
        "seconds": piece.seconds,
    }


def _summed(columns: Sequence[Sequence[int]]) -> list[int]:
    longest = max(map(len, columns), default=0)
    return [sum(column[i] for column in columns if i < len(column)) for i in range(longest)]
