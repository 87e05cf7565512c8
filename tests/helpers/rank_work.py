"""What the ranks of tests do; every function returns what JSON can represent."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from constraints import Maze

import layerskip
from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.engine import Engine
from layerskip.decoding.prefix.blocks import PrefixBlocks
from layerskip.decoding.request import make_request
from layerskip.language_model import LanguageModel
from layerskip.model.decoder import Decoder
from layerskip.model.decoders.parallel import ParallelDecoder

PROMPTS = [[7], [3, 1, 4, 1, 5, 9, 2, 6], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25]]
"""Prompts of different lengths, one of a single token."""
PLAIN: dict[str, Any] = {"generation_strategy": "autoregressive"}
RULES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8, "seed": 3},
    "filters": {"temperature": 1.2, "top_k": 12, "top_p": 0.8, "min_p": 0.02, "seed": 4},
    "nucleus": {"do_sample": True, "top_p": 0.9, "seed": 5},
    "penalties": {"temperature": 0.9, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "seed": 6},
    "counts": {"frequency_penalty": 0.9, "presence_penalty": 0.4, "logit_bias": {2: 2.0, 30: 1.5, 41: -3.0}},
}


TOKENS = 10
FEW = ("greedy", "filters")
"""Rules for models that are tried in a few ways only."""


def settings(num_layers: int, *, all_exits: bool) -> dict[str, dict[str, Any]]:
    """Ways to decode whose texts equal plain decoding's."""
    shapes = [(exit_layer, count) for exit_layer in range(1, num_layers + 1) for count in (1, 4)]
    if not all_exits:
        return {"exit 1, 4 drafts": {"exit_layer": 1, "num_speculations": 4}, "adaptive": {}}
    drafting = {
        f"exit {exit_layer}, {count} drafts": {"exit_layer": exit_layer, "num_speculations": count}
        for exit_layer, count in shapes
    }
    return {**drafting, "adaptive": {}, "text": {"generation_strategy": "ngram"}}


REJECTION: dict[str, dict[str, Any]] = {
    "token by token": {"exit_layer": 2, "num_speculations": 3, "block_verification": False},
    "in blocks": {"exit_layer": 3, "num_speculations": 4, "block_verification": True},
    "drafts from the text": {"generation_strategy": "ngram", "num_speculations": 3},
}
"""Ways to decode by rejection sampling, each with a text of its own."""


SERVED: list[dict[str, Any]] = [
    {"exit_layer": 2},
    {"generation_strategy": "ngram"},
    {"exit_layer": 1},
    PLAIN,
]
"""Strategies of the requests that `serve` serves."""


def write_by_rejection(lm: LanguageModel) -> dict[str, list[list[int]]]:
    """Token ids after all prompts, by way."""
    options: dict[str, Any] = {"acceptance": "rejection", "temperature": 0.9, "top_k": 30, "seed": 7}
    return {
        way: [list(result.token_ids) for result in lm.generate(PROMPTS, max_new_tokens=TOKENS, **options, **drafting)]
        for way, drafting in REJECTION.items()
    }


def load(model: str, **options: Any) -> LanguageModel:
    """A model that all ranks of this process's group share."""
    ranks = dist.get_world_size()
    return layerskip.load(model, device="cpu", dtype="float32", tensor_parallel=ranks, **options)


def write_texts(models: dict[str, str], all_exits: list[str], **options: Any) -> dict[str, Any]:
    """Token ids after all prompts, in one batch, by model, rules and way to decode.

    Args:
        models: Folder by name.
        all_exits: Names of models that are tried at all exits, and with all rules.
        **options: Of loading.
    """
    found: dict[str, Any] = {}
    for name, model in models.items():
        lm, thorough = load(model, **options), name in all_exits
        for rules, sampling in RULES.items():
            if not thorough and rules not in FEW:
                continue
            for way, drafting in {"plain": PLAIN, **settings(lm.config.num_layers, all_exits=thorough)}.items():
                results = lm.generate(PROMPTS, max_new_tokens=TOKENS, **sampling, **drafting)
                found.setdefault(name, {}).setdefault(rules, {})[way] = [result.token_ids for result in results]
        if thorough:
            found[name]["rejection"] = write_by_rejection(lm)
    return found


def distinct_bytes(decoder: Decoder) -> int:
    """Bytes of layers and head; a matrix that several layers have counts once."""
    network = decoder._network
    linears = {id(network.head): network.head}
    for layer in network.layers:
        for linear in (layer.qkv, layer.o, *(part for pair in layer.gated for part in pair)):  # type: ignore[attr-defined]
            linears[id(linear)] = linear
    return sum(linear.num_bytes for linear in linears.values())


def sizes(models: dict[str, str]) -> dict[str, int]:
    """Bytes of weights in this rank, by model; in the file's dtype or float32, embedding and head counted once."""
    found = {}
    for name, model in models.items():
        decoder = load(model).decoder
        total = distinct_bytes(decoder)
        if not decoder.config.tie_word_embeddings:
            total += decoder._embedding.numel() * 4  # type: ignore[union-attr]
        found[name] = total
    return found


def count_traffic(model: str, steps: int, replicate_layers: int = 0, **options: Any) -> dict[str, Any]:
    """What a rank gives to the others while it generates `steps` tokens after the first one, and the layers entered."""
    lm = load(model, replicate_layers=replicate_layers)
    decoder = lm.decoder
    assert isinstance(decoder, ParallelDecoder)
    stream = lm.stream([PROMPTS[1]], max_new_tokens=steps + 1, **options)
    next(iter(stream))
    calls: list[tuple[int, int, int, int]] = []
    decoder.calls.observer = lambda *call: calls.append(call)
    before = replace(decoder.group.sums), replace(decoder.group.others)
    for _ in stream:
        pass
    after = decoder.group.sums, decoder.group.others
    counts = [(b.calls - a.calls, b.num_bytes - a.num_bytes) for a, b in zip(before, after, strict=True)]
    (sums, sum_bytes), (others, other_bytes) = counts
    rounds = stream.results()[0].stats.rounds
    return {
        "sums": sums,
        "sum_bytes": sum_bytes,
        "others": others,
        "other_bytes": other_bytes,
        "calls": calls,
        "rounds": rounds,
    }


def choose(vocab: int, cases: list[dict[str, Any]]) -> list[Any]:
    """Tokens and probabilities that ranks choose of logits of which each has a part."""
    from layerskip.model.decoders.vocabulary_part import VocabularyPart
    from layerskip.model.draw import Draw
    from layerskip.model.parallel.group import RankGroup
    from layerskip.model.parallel.share import _cut

    group = RankGroup()
    parts = _cut(vocab, [1.0] * group.size, 1)
    part = VocabularyPart(group, parts[group.rank])
    found = []
    for index, case in enumerate(cases):
        generator = torch.Generator().manual_seed(index)
        logits = 3 * torch.randn(2, 3, vocab, generator=generator)
        draw = None if case is None else Draw(**{name: tuple(values) for name, values in case.items()})
        own = logits[..., parts[group.rank].start : parts[group.rank].stop].contiguous()
        tokens, probs = part.choose(part.filter(draw, own), draw, [5, 9], confident=True)
        assert probs is not None
        found.append([tokens.tolist(), probs.tolist()])
        assert torch.equal(part.whole(own, [len(each) for each in parts]), logits)
    return found


def wait_in_exchanges(pids: str) -> None:
    """Exchange sums until a rank dies."""
    import os
    import time

    from layerskip.model.parallel.group import RankGroup

    group = RankGroup()
    Path(pids, f"{group.rank}.pid").write_text(str(os.getpid()))
    while True:
        group.sum(torch.ones(4))
        time.sleep(0.01)


def fail_alone(rank: int) -> None:
    """One rank raises an error, the others wait for it."""
    from layerskip.model.parallel.group import RankGroup

    group = RankGroup()
    group.sum(torch.ones(4))
    if group.rank == rank:
        group.watch.failed("the disk is full")
        raise SystemExit(1)
    group.sum(torch.ones(4))


def write_guided(model: str, ways: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Token ids and log-probabilities under constraints, by way to decode; and those of a prompt."""
    return guided_texts(load(model), ways)


def guided_texts(lm: LanguageModel, ways: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """As `write_guided`, of any model."""
    found: dict[str, Any] = {}
    for way, options in ways.items():
        config = GenerationConfig(max_new_tokens=TOKENS, logprobs=2, **options)
        requests = [
            lm.request(
                prompt,
                config,
                seed=config.seed or 0,
                constraint=Maze(seed, lm.config.vocab_size),
                prompt_logprobs=1,
            )
            for seed, prompt in enumerate(PROMPTS)
        ]
        results = lm.start(requests).run()
        found[way] = [
            {
                "tokens": result.token_ids,
                "logprobs": [asdict(told) for told in result.logprobs or ()],
                "prompt": [told and asdict(told) for told in result.prompt_logprobs or ()],
            }
            for result in results
        ]
    return found


def serve(model: str, *, seconds_of_others: float, **options: Any) -> dict[str, Any]:
    """An engine as a server has it: prompts at the pace of rounds, blocks and texts of other requests.

    Args:
        model: Folder.
        seconds_of_others: What ranks but the first take longer for everything, as they measure it.
        **options: Of loading.
    """
    lm = load(model, **options)
    chunks: list[list[int]] = []

    def note(start: int, stop: int, num_rows: int, num_queries: int) -> None:
        if start == 0 and num_queries > 1:
            chunks.append([num_rows, num_queries])

    lm.decoder.calls.observer = note
    stopwatch = lm.decoder.stopwatch
    measured, late = stopwatch.since, seconds_of_others * dist.get_rank()
    stopwatch.since = lambda started: measured(started - late)  # type: ignore[method-assign]
    blocks = PrefixBlocks(max_bytes=400_000, block_tokens=4)
    engine = Engine(lm.decoder, max_rows=3, capacity=90, prefix_blocks=blocks, paces_reading=True, shares_suffixes=True)
    rows = []
    for turn in range(2):
        for number, length in enumerate((3, 60, 61, 20)):
            while not engine.free_rows:
                engine.step()
            config = GenerationConfig(
                max_new_tokens=TOKENS, seed=turn, temperature=0.8 * turn, acceptance="coupled", **SERVED[number]
            )
            prompt = [*(5 + place % 40 for place in range(length - 1)), 1]
            rows.append(engine.add(make_request(lm.decoder, prompt, config, seed=turn)))
            engine.step()
            engine.step()
    while engine.rows:
        engine.step()
    counts = engine.prefix_counts
    return {
        "texts": [row.output for row in rows],
        "chunks": chunks,
        "cached": [row.recorder.cached_tokens for row in rows],
        "counts": [counts.queries, counts.hits, counts.usage],
    }
