"""Logits equal transformers' for every family, however a text is cut into blocks.

Shapes: B rows, Q tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import layerskip
from layerskip.decoding import scoring
from layerskip.model.cache import KVCache
from layerskip.model.decoder import Decoder

TOLERANCE = 1e-4
BLOCKS = (3, 1, 5, 8, 2, 9, 1, 1)
SHORT = 5
"""Tokens of a text where an early token may change what the others give."""


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


@torch.inference_mode()
def run_block(decoder: Decoder, cache: KVCache, block: Sequence[Sequence[int]]) -> Tensor:
    """Logits [B, Q, V] of Q more tokens in each row, right after what each row has committed."""
    positions = decoder.place(cache, cache.lengths, len(block[0]))
    hidden = decoder.embed(torch.tensor(block))
    return decoder.unembed(decoder.run_layers(hidden, positions, cache, 0, decoder.num_layers))


def test_prefill(pair: Any) -> None:
    assert pair.logits.std() > 0.5
    assert difference(pair.ours.logits(pair.tokens), pair.logits) <= TOLERANCE


def test_prefill_in_chunks(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "PREFILL_CHUNK", 7)
    assert difference(pair.ours.logits(pair.tokens), pair.logits) <= TOLERANCE


def test_transformers_agrees_with_itself(pair: Any) -> None:
    """The reference's two attentions, so that a wrong mask in one of them isn't taken for the truth."""
    other = AutoModelForCausalLM.from_pretrained(pair.folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.inference_mode():
        logits = other(torch.tensor([pair.tokens])).logits[0]
    assert difference(logits, pair.logits) <= TOLERANCE


def test_every_switch_of_the_case_matters(pair: Any, changed_logits: Callable[[dict[str, Any]], Tensor]) -> None:
    for changes in pair.case.neutral:
        assert difference(changed_logits(changes), pair.logits) > 10 * TOLERANCE, changes


def test_token_by_token(pair: Any) -> None:
    cache = pair.ours.decoder.new_cache(1, len(pair.tokens))
    rows = []
    for token in pair.tokens:
        rows.append(run_block(pair.ours.decoder, cache, [[token]])[0])
        cache.commit(0, 1)
    assert difference(torch.cat(rows), pair.logits) <= TOLERANCE


def test_blocks_with_rejected_tails(pair: Any) -> None:
    """As in verification: every block is followed by wrong tokens, whose keys and values stay until overwritten."""
    cache = pair.ours.decoder.new_cache(1, len(pair.tokens) + 4)
    rows, done = [], 0
    while done < len(pair.tokens):
        block = pair.tokens[done : done + BLOCKS[len(rows) % len(BLOCKS)]]
        rows.append(run_block(pair.ours.decoder, cache, [[*block, 7, 8, 9, 10]])[0, : len(block)])
        cache.commit(0, len(block))
        done += len(block)
    assert difference(torch.cat(rows), pair.logits) <= TOLERANCE


def test_rollback(pair: Any) -> None:
    cache = pair.ours.decoder.new_cache(1, len(pair.tokens))
    half = len(pair.tokens) // 2
    run_block(pair.ours.decoder, cache, [[*pair.tokens[:half], *reversed(pair.tokens[half:])]])
    cache.commit(0, len(pair.tokens))
    cache.rollback(0, half)
    logits = run_block(pair.ours.decoder, cache, [pair.tokens[half:]])[0]
    assert difference(logits, pair.logits[half:]) <= TOLERANCE


def test_ragged_batch(pair: Any) -> None:
    """Rows of other lengths, read with padding on the right and then continued in blocks of 1 and 4."""
    tokens, decoder = pair.tokens, pair.ours.decoder
    if pair.case.max_context:  # transformers takes the long factors only for texts beyond the original context
        texts = [tokens, tokens[::-1], tokens[20:] + tokens[:20]]
    else:
        texts = [tokens, tokens[:3:-1], tokens[5:27]]
    wanted = [pair.reference(text) for text in texts]
    lengths = [len(texts[0]) - 9, len(texts[1]) - 20, 8]
    cache = decoder.new_cache(3, len(tokens))
    padded = [(text[:n] + [0] * len(tokens))[: max(lengths)] for text, n in zip(texts, lengths, strict=True)]
    logits = run_block(decoder, cache, padded)
    for row, n in enumerate(lengths):
        assert difference(logits[row, :n], wanted[row][:n]) <= TOLERANCE
        cache.commit(row, n)
    for size in (4, 1, 4):
        first = list(cache.lengths)
        logits = run_block(decoder, cache, [text[n : n + size] for text, n in zip(texts, first, strict=True)])
        for row, n in enumerate(first):
            assert difference(logits[row], wanted[row][n : n + size]) <= TOLERANCE
            cache.commit(row, size)


def test_rows_without_room_disturb_nobody(pair: Any) -> None:
    """Blocks that reach beyond a full row's end go to the scratch slot, and the other row's logits stay right."""
    tokens, decoder = pair.tokens, pair.ours.decoder
    cache = decoder.new_cache(2, len(tokens))
    run_block(decoder, cache, [tokens, tokens])
    cache.commit(0, len(tokens) - 2)
    cache.commit(1, 10)
    logits = run_block(decoder, cache, [[*tokens[-2:], 1, 2, 3], tokens[10:15]])
    assert difference(logits[0, :2], pair.logits[-2:]) <= TOLERANCE
    assert difference(logits[1], pair.logits[10:15]) <= TOLERANCE
    cache.commit(1, 5)
    logits = run_block(decoder, cache, [[1] * 4, tokens[15:19]])
    assert difference(logits[1], pair.logits[15:19]) <= TOLERANCE


def test_exits(pair: Any) -> None:
    theirs = pair.theirs
    with torch.inference_mode():
        states = theirs(torch.tensor([pair.tokens]), output_hidden_states=True).hidden_states
        cap = getattr(theirs.config, "final_logit_softcapping", None)
        for exit_layer in range(1, pair.ours.decoder.num_layers):
            wanted = theirs.lm_head(theirs.model.norm(states[exit_layer]))[0]
            wanted = wanted / getattr(theirs.config, "logits_scaling", 1.0)
            wanted = wanted if cap is None else cap * torch.tanh(wanted / cap)
            assert difference(wanted, pair.logits) > 100 * TOLERANCE
            assert difference(pair.ours.logits(pair.tokens, exit_layer=exit_layer), wanted) <= TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_weights_are_close(pair: Any, dtype: str) -> None:
    """As close to the float32 logits as transformers is in that dtype; most of them, where rounding changes experts.

    A token that goes to another expert changes those after it, so texts are short there, and it changes few.
    """
    lm = layerskip.load(str(pair.folder), dtype=dtype, max_context=pair.case.max_context)
    assert lm.decoder.dtype == getattr(torch, dtype)
    theirs = AutoModelForCausalLM.from_pretrained(pair.folder, dtype=lm.decoder.dtype).eval()
    sparse, length = lm.config.sparse_layers, len(pair.tokens)
    size = SHORT if sparse else length
    texts = [pair.tokens[start : start + size] for start in range(0, length, size)]
    wanted = torch.cat([pair.reference(text) for text in texts]) if sparse else pair.logits
    logits = torch.cat([lm.logits(text) for text in texts])
    assert logits.dtype == torch.float32
    with torch.inference_mode():
        other = torch.cat([theirs(torch.tensor([text])).logits[0].float() for text in texts])
    if sparse:
        errors = ((x - wanted).norm(dim=-1) / wanted.norm(dim=-1) for x in (logits, other))
        ours, usual = (float(error.median()) for error in errors)
    else:
        ours, usual = (float((x - wanted).norm() / wanted.norm()) for x in (logits, other))
    assert ours < max(2e-2, 1.25 * usual)
    assert ours < 6e-2
