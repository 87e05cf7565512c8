"""Several rounds in one call: drafts, verification, acceptance, and the next round after what was accepted.

Python between two rounds takes about as long as a step of a small network.

Shapes: B rows, R rounds, K drafts of a row in a round at most.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from layerskip.model.cache import KVCache
from layerskip.model.drafts import DraftRequest, Lease, RoundTokens
from layerskip.model.finite import not_finite
from layerskip.model.native.arrays import int32s, int64s, split
from layerskip.model.native.library import RoundsCall, StopRuleView, address, load_library
from layerskip.model.native.network import NativeNetwork
from layerskip.model.native.sampling import sampling_view

MOST_TOKENS = 4096
"""Tokens for which a call has room."""


@dataclass(frozen=True, kw_only=True)
class RoundNetworks:
    """What runs in a round."""

    verifier: NativeNetwork
    drafter: NativeNetwork
    shares_states: bool
    """Whether verification goes on from the states of drafting."""


def run_rounds(
    networks: RoundNetworks,
    tokens: Sequence[int],
    cache: KVCache,
    request: DraftRequest,
    num_layers: int,
    lease: Lease,
) -> list[RoundTokens]:
    """`Decoder.rounds` in one call; only where the kernels read the embeddings, and no logits are capped.

    Args:
        networks: What drafts and what verifies.
        tokens: As for `Decoder.rounds`.
        cache: As for `Decoder.rounds`.
        request: As for `Decoder.rounds`.
        num_layers: As for `Decoder.rounds`.
        lease: As for `Decoder.rounds`.

    Raises:
        NotFiniteError: A draft of the first round could not be chosen.
    """
    library = load_library()
    assert library is not None
    rows, stop = len(tokens), request.stop
    limits = request.limits(rows) if request.exit_layer else [0] * rows
    room = sum(limits) + rows
    most = max(1, min(lease.rounds, *lease.remaining, MOST_TOKENS // room))
    written, drawn = _room("i", most * rows), _room("i", most * rows)
    seconds, confidences = _room("d", 2 * most), _room("f", most * sum(limits))
    drafts, targets = _room("q", most * sum(limits)), _room("q", most * room)
    last, starts, remaining = int64s(tokens), int64s(cache.lengths), int64s(lease.remaining)
    most_drafts, num_ends = int32s(limits), int32s([len(ends) for ends in lease.ends])
    ends = int64s([token for row in lease.ends for token in row])
    texts = array("q", chain([], *(text[:-1] for text in lease.texts), [0]))  # never empty, or it would lie nowhere
    view = networks.verifier.cache_view(cache)
    stop_rule = None if stop is None else StopRuleView(rates=stop.rates, least=stop.least, kept=stop.kept)
    sampling = None if request.draw is None else sampling_view(request.draw)
    done = library.layerskip_rounds(
        RoundsCall(
            network=address(networks.verifier.view),
            drafter=address(networks.drafter.view),
            cache=address(view),
            embedding=address(networks.verifier.embedding_view),
            draft_embedding=address(networks.drafter.embedding_view),
            stop_rule=address(stop_rule),
            sampling=address(sampling),
            tokens=address(last),
            starts=address(starts),
            remaining=address(remaining),
            limits=address(most_drafts),
            ends=address(ends),
            num_ends=address(num_ends),
            texts=texts.buffer_info()[0] if lease.texts else None,
            written=written.buffer_info()[0],
            drawn=drawn.buffer_info()[0],
            drafts=drafts.buffer_info()[0],
            targets=targets.buffer_info()[0],
            confidences=confidences.buffer_info()[0],
            seconds=seconds.buffer_info()[0],
            most_seconds=lease.seconds,
            rows=rows,
            exit_layer=request.exit_layer,
            num_layers=num_layers,
            complete=networks.shares_states,
            most_rounds=most,
            repeated=lease.repeated,
        )
    )
    if done < 0:
        raise not_finite(torch.float32)
    verified = written[: done * rows].tolist()
    rows_drafts = split(drafts[: sum(verified)].tolist(), verified)
    rows_targets = split(targets[: sum(verified) + len(verified)].tolist(), [count + 1 for count in verified])
    rows_confidences = None if stop is None else split(confidences.tolist(), drawn[: done * rows])
    return [
        RoundTokens(
            drafts=rows_drafts[first : first + rows],
            targets=rows_targets[first : first + rows],
            confidences=() if rows_confidences is None else rows_confidences[first : first + rows],
            seconds_drafting=seconds[2 * place],
            seconds_verifying=seconds[2 * place + 1],
        )
        for place, first in enumerate(range(0, done * rows, rows))
    ]


def _room(kind: str, count: int) -> "array[Any]":
    """Room for numbers, never empty; each size of a `ctypes` array would be a type of its own, slow to make."""
    room = array(kind, [0])
    return room * max(1, count)
