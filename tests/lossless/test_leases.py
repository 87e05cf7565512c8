"""Many rounds in one call give what one round at a time gives: tokens, statistics, layers, and what the cache holds."""

import _thread
import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import write_tiny_adapters
from engines import cache_of, drain, start
from layers import Entry, entries_of
from safetensors.torch import load_file, save_file

import layerskip
from layerskip.decoding.policy import FixedPolicy, Plan, RoundResult
from layerskip.decoding.rounds.verifying import FOREIGN_ROUNDS
from layerskip.errors import NotFiniteError
from layerskip.language_model import LanguageModel
from layerskip.model.drafts import DraftRequest, Lease, StopRule
from layerskip.model.native.library import load_library

pytestmark = pytest.mark.skipif(load_library() is None, reason="the compiled kernels weren't built")
LONG = 60.0
"""Seconds that no test takes."""
EXITS = (2, 3)
KINDS = ("plain", "adapters", "adapters of some tokens", "experts", "draft weights", "draft vocabulary")
WAYS: list[dict[str, Any]] = [
    {"generation_strategy": "autoregressive"},
    {"generation_strategy": "early_exit", "exit_layer": 3},
    *({"exit_layer": exit_layer, "num_speculations": k} for exit_layer in (1, 2, 4) for k in (1, 4, 9)),
]
RULES: list[dict[str, Any]] = [{}, {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.95, "seed": 5}]
PROMPTS = [[7], [3, 1, 4, 1, 5, 9, 2, 6], [11, 12, 13]]


@pytest.fixture(scope="module")
def load(
    lm_folder: Path, tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], LanguageModel]:
    """Loads a network of a kind, once."""
    known: dict[str, LanguageModel] = {}

    def make(kind: str) -> LanguageModel:
        folder, options = lm_folder, dict[str, Any]()
        match kind:
            case "adapters":
                options["exit_adapters"] = write_tiny_adapters(tmp_path_factory.mktemp("all"), folder, EXITS)
            case "adapters of some tokens":
                some = tmp_path_factory.mktemp("some")
                options["exit_adapters"] = write_tiny_adapters(some, folder, EXITS, tokens=range(0, 48, 2))
            case "experts":
                folder = tiny_checkpoint("qwen3_moe", num_hidden_layers=5)
            case "draft weights":
                options["quantize_draft"] = "int4"
            case "draft vocabulary":
                options["draft_vocabulary"] = 20
        return layerskip.load(str(folder), dtype="float32", device="cpu", kernels="native", **options)

    return lambda kind: known.setdefault(kind, make(kind)) if kind not in known else known[kind]


@dataclass(frozen=True)
class Outcome:
    """All that a generation is to agree in."""

    tokens: list[list[int]]
    rounds: list[list[tuple[Any, ...]]]
    """Of each row: what each round gave; steps count one by one."""
    stats: list[dict[str, Any]]
    entries: list[Entry]
    keys: torch.Tensor
    values: torch.Tensor


def run(lm: LanguageModel, prompts: list[list[int]] = PROMPTS, **options: Any) -> tuple[Outcome, int]:
    """What a generation gives, and how many steps of the engine it took."""
    entries: list[Entry] = []
    lm.decoder.calls.observer = entries_of(entries)
    try:
        engine = start(lm.decoder, prompts, **options)
        rows, cache, steps, events = engine.rows, cache_of(engine), 0, []
        while engine.rows:
            events += engine.step()
            steps += 1
    finally:
        lm.decoder.calls.observer = None
    stats = []
    for row in rows:
        whole = dataclasses.asdict(row.recorder.finish(row.prompt_length, len(row.output)))
        stats.append({name: value for name, value in whole.items() if "second" not in name and name[:4] != "time"})
    rounds: list[list[tuple[Any, ...]]] = [[] for _ in rows]
    for event in events:
        parts = [event.tokens] if event.drafts else [(token,) for token in event.tokens]
        told = event.drafts, event.num_accepted, event.drafter, event.exit_layer
        rounds[rows.index(event.row)] += [(part, *told) for part in parts]
    longest = max(len(row.tokens) for row in rows) - 1
    keys, values = cache.keys[:, :, :longest].clone(), cache.values[:, :, :longest].clone()
    return Outcome([row.output for row in rows], rounds, stats, entries, keys, values), steps


def check_same(ours: Outcome, theirs: Outcome, *, alone: bool) -> None:
    assert ours.tokens == theirs.tokens
    assert ours.rounds == theirs.rounds
    assert ours.stats == theirs.stats
    assert ours.entries == theirs.entries
    if alone:  # rows of a batch that end change places, and leave behind what nobody reads
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rules", RULES, ids=["greedy", "sampled"])
def test_a_call_of_many_rounds_gives_what_single_rounds_give(
    load: Callable[[str], LanguageModel], kind: str, rules: dict[str, Any]
) -> None:
    lm = load(kind)
    for way in WAYS:
        for prompts in (PROMPTS[1:2], PROMPTS):
            options = {**way, **rules, "max_new_tokens": 40, "ignore_eos": True}
            (single, more), (many, fewer) = (run(lm, prompts, lease_seconds=s, **options) for s in (0.0, LONG))
            check_same(many, single, alone=len(prompts) == 1)
            assert fewer < more
            if len(prompts) == 1:
                assert fewer == 2  # the prompt, and all the rest


@pytest.mark.parametrize("rounds", [1, 2, 3, 1000])
@pytest.mark.parametrize("rules", RULES, ids=["greedy", "sampled"])
def test_leases_of_any_length(load: Callable[[str], LanguageModel], rounds: int, rules: dict[str, Any]) -> None:
    lm, options = load("adapters"), {**rules, "exit_layer": 2, "num_speculations": 4, "max_new_tokens": 40}

    class Noting(FixedPolicy):
        def observe(self, plan: Plan, result: RoundResult) -> None:
            seen.append([result.gained(row) for row in range(len(result.drafts))])

    seen: list[list[tuple[int, ...]]] = []
    plan = Plan(source="layers", exit_layer=2, num_speculations=4, lease=rounds)
    single, _ = run(lm, **options)
    found, steps = run(lm, lease_seconds=LONG, policy=Noting(fixed=plan), **options)
    check_same(found, single, alone=False)
    longest = max(len(each) for each in single.rounds) - 1
    assert steps >= 1 + longest // rounds
    assert rounds < 1000 or steps <= 1 + len(PROMPTS)  # a call ends when a row does


class Learning:
    """The same plan for several rounds, of which each is observed."""

    def __init__(self, lease: int) -> None:
        self.lease, self.seen, self.asked = lease, list[RoundResult](), 0

    def prepare(self, view: Any) -> None: ...

    def plan(self, view: Any) -> Plan:
        self.asked += 1
        rule = StopRule(rates=(0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95), least=0.3, kept=0.2)
        return Plan(source="layers", exit_layer=2, num_speculations=6, lease=self.lease, stop=rule)

    def observe(self, plan: Plan, result: RoundResult) -> None:
        self.seen.append(result)


def test_a_policy_learns_of_every_round_of_a_lease(load: Callable[[str], LanguageModel]) -> None:
    """Drafts, confidences and seconds are those of each round; their sum isn't more than all of them took."""
    lm, options = load("plain"), {"exit_layer": 2, "max_new_tokens": 60}
    single, many = Learning(1), Learning(5)
    (one, _), (other, _) = (run(lm, lease_seconds=LONG, policy=policy, **options) for policy in (single, many))
    check_same(other, one, alone=False)
    assert many.asked < single.asked == len(single.seen) == len(many.seen)
    for ours, theirs in zip(many.seen, single.seen, strict=True):
        assert (ours.drafts, ours.num_accepted, ours.tokens) == (theirs.drafts, theirs.num_accepted, theirs.tokens)
        assert ours.confidences == theirs.confidences
        assert ours.confidences
        assert ours.settled
        assert ours.seconds > ours.seconds_drafting + ours.seconds_verifying > 0


@pytest.mark.parametrize(("watched", "most"), [(0, 1000), (40, FOREIGN_ROUNDS)])
def test_texts_of_other_requests_are_looked_at_every_few_rounds(
    load: Callable[[str], LanguageModel], watched: int, most: int
) -> None:
    """Compiled code sees repetitions in a row's own text only; where it watches that, it comes back for the others."""
    lm, options = load("plain"), {"exit_layer": 2, "num_speculations": 1, "max_new_tokens": 60}
    plan = Plan(source="layers", exit_layer=2, num_speculations=1, lease=1000, until_repeated=watched)
    single, _ = run(lm, **options)
    found, steps = run(lm, lease_seconds=LONG, policy=FixedPolicy(fixed=plan), shares_suffixes=True, **options)
    check_same(found, single, alone=False)
    longest = max(len(each) for each in single.rounds) - 1
    assert longest > 2 * FOREIGN_ROUNDS
    assert longest / most <= steps <= longest / most + 2 * len(PROMPTS)


@pytest.mark.parametrize("kind", ["plain", "adapters"])
@pytest.mark.parametrize("rules", RULES, ids=["greedy", "sampled"])
def test_rows_end_where_they_would(load: Callable[[str], LanguageModel], kind: str, rules: dict[str, Any]) -> None:
    """At every token of a text in turn, also the first, and in the middle of a round's drafts; limits likewise."""
    lm = load(kind)
    options = {**rules, "exit_layer": 2, "num_speculations": 5, "lease_seconds": LONG}
    full, _ = run(lm, PROMPTS[:2], **options, max_new_tokens=24)
    for end in range(24):
        token = full.tokens[0][end]
        found, _ = run(lm, PROMPTS[:2], **options, max_new_tokens=24, eos_token_ids=(token,))
        for ours, theirs in zip(found.tokens, full.tokens, strict=True):
            assert ours == theirs[: theirs.index(token) + 1 if token in theirs else None]
        cut, _ = run(lm, PROMPTS[:2], **options, max_new_tokens=end + 1)
        assert cut.tokens == [tokens[: end + 1] for tokens in full.tokens]
        single, _ = run(lm, PROMPTS[:2], **{**options, "lease_seconds": 0.0}, max_new_tokens=end + 1)
        assert cut.stats == single.stats


def test_a_row_fills_its_context(load: Callable[[str], LanguageModel]) -> None:
    lm = load("plain")
    prompt = [1 + i % 40 for i in range(lm.decoder.max_context - 9)]
    for way in WAYS:
        options = {**way, "max_new_tokens": 500, "ignore_eos": True}
        single, _ = run(lm, [prompt, [5]], **options)
        many, _ = run(lm, [prompt, [5]], lease_seconds=LONG, **options)
        check_same(many, single, alone=False)
        assert len(many.tokens[0]) == 9


def test_seeds_differ_and_repeat(load: Callable[[str], LanguageModel]) -> None:
    lm, options = load("plain"), {"exit_layer": 2, "do_sample": True, "max_new_tokens": 30, "lease_seconds": LONG}
    found = [run(lm, [[7]] * 3, seeds=seeds, **options)[0].tokens for seeds in ([1, 2, 1], [2, 1, 3])]
    assert found[0][0] == found[0][2] == found[1][1]
    assert found[0][1] == found[1][0]
    assert len({tuple(tokens) for text in found for tokens in text}) == 3


def test_after_no_time_there_is_one_round(load: Callable[[str], LanguageModel]) -> None:
    engine = start(load("plain").decoder, [[7]], exit_layer=2, max_new_tokens=30, lease_seconds=0.0)
    engine.step()
    while engine.rows:
        (event,) = engine.step()
        assert event.ends == (not engine.rows)


def test_other_rows_arrivals_and_stop_strings_ask_for_single_rounds(load: Callable[[str], LanguageModel]) -> None:
    """Nobody waits for a row that would run alone for long."""
    decoder = load("plain").decoder
    options = {"generation_strategy": "autoregressive", "max_new_tokens": 30, "lease_seconds": LONG}
    engine = start(decoder, [[7], [8, 9, 10]], prefill_chunk=1, **options)
    engine.step()
    assert [len(event.tokens) for event in engine.step()] == [1]  # while the second row's prompt is read
    engine = start(decoder, [[7]], stop=("never",), **options)
    engine.step()
    assert [len(event.tokens) for event in engine.step()] == [1]
    engine = start(decoder, [[7]], **options)
    engine.step()
    assert sum(len(event.tokens) for event in engine.step()) > 5


def test_a_watched_row_asks_once_its_last_tokens_repeat(load: Callable[[str], LanguageModel]) -> None:
    decoder = load("plain").decoder
    cache = decoder.new_cache(1, 90)
    text, _ = run(load("plain"), [[7]], generation_strategy="autoregressive", max_new_tokens=80, ignore_eos=True)
    tokens = [7, *text.tokens[0]]
    pairs = list(itertools.pairwise(tokens))
    repeated = next(end for end in range(1, len(pairs)) if pairs[end] in pairs[:end]) + 1  # index of the last token
    request = DraftRequest(exit_layer=0, num_drafts=0)
    lease = Lease(remaining=[80], ends=[()], rounds=100, seconds=LONG)
    whole = decoder.rounds([7], cache, request, decoder.num_layers, lease)
    assert [round_.targets for round_ in whole] == [[[token]] for token in tokens[1:]]
    watched = decoder.rounds(
        [7], cache, request, decoder.num_layers, dataclasses.replace(lease, texts=[[7]], repeated=2)
    )
    assert len(watched) == repeated


def test_broken_weights_are_found_in_the_middle_of_a_lease(
    load: Callable[[str], LanguageModel], lm_folder: Path, tmp_path: Path
) -> None:
    """What the rounds before gave is kept, and the next one says what is wrong."""
    (good,) = run(load("plain"), [[7]], generation_strategy="autoregressive", max_new_tokens=20)[0].tokens
    place = next(i for i in range(4, 20) if good[i] not in good[:i] and good[i] != 7)
    for file in lm_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.embed_tokens.weight"][good[place]] = torch.nan
    weights.setdefault("lm_head.weight", load_file(lm_folder / "model.safetensors")["model.embed_tokens.weight"])
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    lm = layerskip.load(str(tmp_path), dtype="float32", device="cpu", kernels="native")
    for way in WAYS[:1] + WAYS[2:]:
        engine = start(lm.decoder, [[7]], lease_seconds=LONG, max_new_tokens=20, **way)
        (row,) = engine.rows
        with pytest.raises(NotFiniteError):
            drain(engine)
        assert row.output == good[: len(row.output)]
        assert len(row.output) <= place + 1


def test_an_interrupted_stream_counts_what_was_told(load: Callable[[str], LanguageModel]) -> None:
    """Rounds of which the caller has not heard don't count, though one call has run them all."""
    lm = load("plain")
    for number in (1, 2, 5, 11, 18):
        stream = lm.stream([[7]], exit_layer=2, num_speculations=4, max_new_tokens=40, ignore_eos=True)
        events = [event for _, event in zip(range(number), stream, strict=False)]
        (result,) = stream.results()
        assert result.token_ids == [event.token_id for event in events]
        assert result.stats.accepted == sum(event.source == "accepted" for event in events)
        assert result.finish_reason == "interrupted"


def test_the_adaptive_policy_writes_the_same_texts(load: Callable[[str], LanguageModel]) -> None:
    for kind in ("plain", "adapters"):
        lm = load(kind)
        for rules in RULES:
            options = {**rules, "max_new_tokens": 60, "ignore_eos": True}
            expected, _ = run(lm, generation_strategy="autoregressive", **options)
            for seconds in (0.0, LONG):
                found, _ = run(lm, generation_strategy="adaptive", lease_seconds=seconds, **options)
                assert found.tokens == expected.tokens


def test_engines_of_one_process_take_turns(load: Callable[[str], LanguageModel]) -> None:
    """The kernels' threads are locked for a round, not for a lease."""
    lm, found = load("plain"), list[Any]()
    expected, _ = run(lm, exit_layer=2, max_new_tokens=60, ignore_eos=True)

    def work() -> None:
        engine = start(lm.decoder, PROMPTS, exit_layer=2, max_new_tokens=60, ignore_eos=True, lease_seconds=LONG)
        rows = engine.rows
        drain(engine)
        found.append([row.output for row in rows])

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [expected.tokens] * 3


def test_ctrl_c_is_heard_between_two_calls() -> None:
    """A signal reaches Python once a call has returned, and none goes on for longer than the engine lets it."""
    lm = layerskip.load("demo", dtype="float32", device="cpu", kernels="native")
    most = lm.decoder.max_context - 8
    options = {"generation_strategy": "autoregressive", "max_new_tokens": most, "ignore_eos": True}
    full = lm.generate(["def add("], **options)[0].token_ids
    stream = lm.stream(["def add("], **options)
    timer = threading.Timer(0.04, _thread.interrupt_main)
    with contextlib.suppress(KeyboardInterrupt):  # where it doesn't come while a token is waited for
        next(stream)
        timer.start()
        for _ in stream:
            pass
    timer.join()
    (result,) = stream.results()
    assert result.finish_reason == "interrupted"
    assert 0 < len(result.token_ids) < most
    assert result.token_ids == full[: len(result.token_ids)]
