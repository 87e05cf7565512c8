"""Rounds in which every row has its own number of drafts: each row gets what it gets alone."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import write_tiny_adapters
from engines import drain, generate, start
from layers import Entry, entries_of
from policies import Ragged
from scipy.stats import chisquare

import layerskip
from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.engine import Engine
from layerskip.decoding.request import make_request
from layerskip.language_model import LanguageModel
from layerskip.model.cache import KVCache
from layerskip.model.config.families import FAMILIES
from layerskip.model.drafts import CONFIDENCE_CLASSES, DraftCounts, DraftRequest, StopRule
from layerskip.model.native.library import load_library

SAMPLED = {"temperature": 0.9, "top_k": 12, "seed": 5}
REPEATING = [3, 1, 4, 1, 5, 3, 1, 4, 1, 5, 3, 1, 4]
RULES: list[dict[str, Any]] = [
    {},
    SAMPLED,
    {"repetition_penalty": 1.2},
    {"no_repeat_ngram_size": 2, "temperature": 0.8},
]
SPECULATES = {"exit_layer": 1, "num_speculations": 5}
"""What lets a policy plan; it chooses exits and numbers itself."""


@pytest.fixture(scope="module")
def texts(prompts: list[list[int]]) -> list[list[int]]:
    return [*prompts, REPEATING, [9, 9, 9], REPEATING[2:]]


def plain(lm: LanguageModel, texts: list[list[int]], **options: Any) -> list[list[int]]:
    """What each text alone gets, one token after the other."""
    options = {"generation_strategy": "autoregressive", **options}
    return [generate(lm.decoder, [text], **options)[0] for text in texts]


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_each_row_gets_what_it_gets_alone(
    lm: LanguageModel, texts: list[list[int]], seed: int, rules: dict[str, Any]
) -> None:
    policy = Ragged(seed, range(1, lm.decoder.num_layers + 1))
    found = generate(lm.decoder, texts, policy=policy, max_new_tokens=30, **SPECULATES, **rules)
    assert found == plain(lm, texts, max_new_tokens=30, **rules)
    assert policy.is_ragged


def test_prompts_are_read_as_each_would_be_alone(lm: LanguageModel) -> None:
    """In one pass, from where each row has got to, and without those that don't take part."""
    decoder, texts = lm.decoder, [list(range(2, 15)), [7, 8], [9], [4, 3] * 9]
    begun, depth = [5, 0, 0, 11], decoder.num_layers

    def read(rows: list[int], counts: list[int], cache: KVCache) -> list[torch.Tensor]:
        parts = [texts[i][start : start + n] for i, start, n in zip(rows, cache.lengths, counts, strict=True)]
        with torch.inference_mode():
            states = decoder.read_rows(parts, cache, depth)
        for row, part in enumerate(parts):
            cache.commit(row, len(part))
        return states

    together = decoder.new_cache(4, 30)
    read([0, 1, 2, 3], begun, together)
    counts, calls = [8, 2, 0, 4], decoder.calls.count
    found = read([0, 1, 2, 3], counts, together)
    assert decoder.calls.count - calls == depth
    assert [len(states) for states in found] == counts
    for row in (0, 1, 3):
        cache = decoder.new_cache(1, 30)
        if begun[row]:
            read([row], [begun[row]], cache)
        alone = read([row], [counts[row]], cache)[0]
        # In torch, products of several rows add up in another order.
        assert torch.allclose(found[row], alone, atol=0 if decoder.ragged else 1e-5)
        slots = slice(begun[row], begun[row] + counts[row])
        assert torch.allclose(together.keys[:, row, slots], cache.keys[:, 0, slots], atol=1e-5)
        assert torch.allclose(together.values[:, row, slots], cache.values[:, 0, slots], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_every_family(tiny_checkpoint: Callable[..., Path], family: str, kernels: str) -> None:
    lm = layerskip.load(str(tiny_checkpoint(family)), dtype="float32", device="cpu", kernels="auto")
    if kernels == "torch":
        lm = layerskip.load(str(tiny_checkpoint(family)), dtype="float32", device="cpu", kernels="torch")
    elif lm.decoder.kernels != "native":
        pytest.skip("the compiled kernels weren't built, or can't run this model")
    texts = [[5, 9, 11, 40], [7], list(range(3, 16)), [4, 4, 8, 4, 4, 8, 4]]
    for rules in ({}, SAMPLED):
        policy = Ragged(1, range(1, lm.decoder.num_layers + 1))
        options = {"max_new_tokens": 24, "ignore_eos": True, **rules}
        assert generate(lm.decoder, texts, policy=policy, **SPECULATES, **options) == plain(lm, texts, **options)
        assert policy.is_ragged


@pytest.mark.parametrize("kind", ["all", "some", "state"])
@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_exit_adapters(lm_folder: Path, tmp_path: Path, texts: list[list[int]], kind: str, kernels: str) -> None:
    """Their keys are written for every token of every row, also of rows that had no drafts in a round."""
    if kernels == "native" and load_library() is None:
        pytest.skip("the compiled kernels weren't built")
    made: dict[str, Any] = {"all": {}, "some": {"tokens": range(0, 48, 2)}, "state": {"reads_values": False}}
    adapters = write_tiny_adapters(tmp_path / kind, lm_folder, (1, 3), **made[kind])
    lm = layerskip.load(str(lm_folder), dtype="float32", device="cpu", kernels=kernels, exit_adapters=adapters)
    for seed, rules in enumerate([*RULES, {}, SAMPLED]):
        policy = Ragged(seed, (1, 2, 3, 5))
        found = generate(lm.decoder, texts, policy=policy, max_new_tokens=30, **SPECULATES, **rules)
        assert found == plain(lm, texts, max_new_tokens=30, **rules), rules
        assert policy.is_ragged


@pytest.mark.skipif(load_library() is None, reason="the compiled kernels weren't built")
@pytest.mark.parametrize("options", [{"draft_vocabulary": 20}, {"quantize_draft": "int8"}], ids=str)
def test_other_weights_that_draft(lm_folder: Path, texts: list[list[int]], options: dict[str, Any]) -> None:
    lm = layerskip.load(str(lm_folder), dtype="float32", device="cpu", kernels="native", **options)
    for seed, rules in enumerate(RULES):
        policy = Ragged(seed, (1, 2))
        found = generate(lm.decoder, texts, policy=policy, max_new_tokens=24, **SPECULATES, **rules)
        assert found == plain(lm, texts, max_new_tokens=24, **rules), rules


@pytest.mark.parametrize("seed", range(3))
def test_ends_inside_drafts_single_tokens_and_full_caches(lm: LanguageModel, texts: list[list[int]], seed: int) -> None:
    written = plain(lm, texts, max_new_tokens=30)
    ends = (written[1][7], written[3][4])
    room = lm.decoder.max_context
    for options in ({"eos_token_ids": ends, "max_new_tokens": 30}, {"max_new_tokens": 1}, {"max_new_tokens": room}):
        policy = Ragged(seed, range(1, lm.decoder.num_layers + 1))
        found = generate(lm.decoder, texts, policy=policy, **SPECULATES, **options)
        assert found == plain(lm, texts, **options), options


@pytest.mark.parametrize("keeps_prefixes", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_rows_join_and_leave_between_ragged_rounds(
    lm: LanguageModel, texts: list[list[int]], seed: int, keeps_prefixes: bool
) -> None:
    pick = random.Random(seed)
    requests = []
    for _ in range(14):
        options = {**SPECULATES, **pick.choice(RULES), "max_new_tokens": pick.randint(1, 25)}
        requests.append(
            (pick.choice(texts), options, pick.randrange(20), pick.choice([None, None, pick.randint(1, 9)]))
        )
    policy = Ragged(seed, range(1, lm.decoder.num_layers + 1))
    engine = Engine(lm.decoder, max_rows=5, capacity=60, policy=policy, prefill_chunk=4, keeps_prefixes=keeps_prefixes)
    waiting, rows, step = sorted(requests, key=lambda request: request[2]), [], 0
    while waiting or engine.rows:
        while waiting and waiting[0][2] <= step and engine.free_rows:
            request = waiting.pop(0)
            config = GenerationConfig(**request[1])
            made = make_request(lm.decoder, request[0], config, seed=config.seed or 0)
            rows.append((request, engine.add(made)))
        engine.step()
        for (_, _, _, leaves), row in rows:
            if row.finish_reason is None and leaves is not None and len(row.output) >= leaves:
                engine.finish(row, "interrupted", length=leaves)
        step += 1
    for (text, options, _, leaves), row in rows:
        rules = {name: value for name, value in options.items() if name not in SPECULATES}
        (expected,) = plain(lm, [text], **rules)
        assert row.output == (expected[:leaves] if row.finish_reason == "interrupted" else expected)


@pytest.mark.parametrize("block", [True, False])
def test_rejection_sampling_keeps_the_distribution(make_lm: Callable[..., LanguageModel], block: bool) -> None:
    """Of the two tokens after the first, where what a row may draft changes from round to round and row to row."""
    vocab, rows = 8, 400
    lm = make_lm(vocab=vocab, width=16, layers=3, early=1, late=0.8, context=16, sharpness=1.5, kernels="torch")
    prompt = [1, 2, 7, 1, 3, 6, 1, 4, 5, 1]
    expected = torch.zeros(vocab, vocab, dtype=torch.double)
    first = lm.logits(prompt)[-1].double().softmax(-1)
    for a in range(vocab):
        second = lm.logits([*prompt, a])[-1].double().softmax(-1)
        for b in range(vocab):
            expected[b] += first[a] * second[b] * lm.logits([*prompt, a, b])[-1].double().softmax(-1)
    config = GenerationConfig(
        do_sample=True, acceptance="rejection", block_verification=block, max_new_tokens=4, **SPECULATES
    )
    counts = Counter[tuple[int, int]]()
    for number in range(30):
        policy = Ragged(number, (1, 2), most=3)
        seeds = range(number * rows, (number + 1) * rows)
        engine = start(lm.decoder, [prompt] * rows, config, seeds=seeds, policy=policy)
        written = engine.rows
        drain(engine)
        counts.update((row.output[1], row.output[2]) for row in written)
        assert policy.is_ragged
    observed = torch.tensor([[counts[a, b] for b in range(vocab)] for a in range(vocab)]).double().flatten()
    wanted = expected.flatten() / expected.sum() * observed.sum()
    large = wanted >= 5
    pooled = [torch.cat((x[large], x[~large].sum()[None])) for x in (observed, wanted)]
    keep = pooled[1] > 0
    assert chisquare(pooled[0][keep].numpy(), pooled[1][keep].numpy()).pvalue > 1e-4


def test_draft_counts() -> None:
    """Rows stop alone: at their limits, when they become doubtful, and without a draft that is given up."""
    rates = (0.0, *[0.5] * (CONFIDENCE_CLASSES - 2), 1.0)
    counts = DraftCounts([3, 0, 3, 3], StopRule(rates=rates, least=0.6, kept=0.1))
    counts.add([0.99, 0.99, 0.5, 0.99])
    assert counts.counts == [1, 0, 1, 1]
    assert counts.goes_on
    counts.add([0.99, 0.99, 0.99, 0.01])
    assert counts.counts == [2, 0, 1, 1]
    counts.add([0.99, 0.99, 0.99, 0.99])
    assert counts.counts == [3, 0, 1, 1]
    assert not counts.goes_on
    assert [len(row) for row in counts.confidences] == [3, 0, 1, 2]


@pytest.mark.skipif(load_library() is None, reason="the compiled kernels weren't built")
@pytest.mark.parametrize("seed", range(6))
def test_kernels_draft_and_count_as_torch_does(make_lm: Callable[..., LanguageModel], seed: int) -> None:
    """The same drafts of each row, the same rows that stop, and as many entries into layers."""
    pick = random.Random(seed)
    lengths = tuple(pick.choice([0, 1, 2, 5]) for _ in range(4))
    stop = None
    if seed % 2:
        rates = tuple(pick.random() for _ in range(CONFIDENCE_CLASSES))
        stop = StopRule(rates=rates, least=pick.random() / 2, kept=pick.choice([0.0, 0.3]))
    request = DraftRequest(exit_layer=2, num_drafts=5, lengths=lengths, stop=stop)
    rounds, logs = [], []
    for kernels in ("torch", "native"):
        lm, log = make_lm(kernels=kernels), list[Entry]()
        cache = lm.decoder.new_cache(4, 40)
        with torch.inference_mode():
            positions = lm.decoder.place(cache, cache.lengths, 4)
            hidden = lm.decoder.embed(torch.tensor([[1, 2, 3, 4]] * 4))
            lm.decoder.run_layers(hidden, positions, cache, 0, lm.decoder.num_layers)
            for row, length in enumerate((4, 2, 3, 1)):
                cache.commit(row, length)
            lm.decoder.calls.observer = entries_of(log)
            rounds.append(lm.decoder.round([5, 6, 7, 8], cache, request, lm.decoder.num_layers))
        logs.append(log)
    ours, theirs = rounds[1], rounds[0]
    assert ours.drafts == theirs.drafts
    for row, drafts in enumerate(ours.drafts):
        assert len(drafts) <= lengths[row]
        assert ours.targets[row] == theirs.targets[row][: len(drafts) + 1]
    assert [len(row) for row in ours.confidences] == [len(row) for row in theirs.confidences]
    assert logs[0] == logs[1]
