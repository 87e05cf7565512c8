"""Whole rounds: when they are compiled or captured, what they write, and what is kept of them."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import drain, start

import layerskip
from layerskip.decoding.policy import BatchView, Plan, RoundResult
from layerskip.errors import InvalidArgumentError
from layerskip.model.cache import KVCache
from layerskip.model.decoders.graphs import GraphDecoder
from layerskip.model.drafts import CONFIDENCE_CLASSES, DraftRequest, RoundTokens, StopRule
from layerskip.model.draw import Draw
from layerskip.model.graphs import compiled as compiled_rounds
from layerskip.model.graphs.compiled import CompiledRounds
from layerskip.model.graphs.program import Program, Recorder
from layerskip.model.graphs.rows import RowInputs
from layerskip.model.graphs.static import StaticRound
from layerskip.model.torch.network import TorchNetwork


class FakeCuda:
    """`torch.cuda` for a capture that runs on the CPU, where recording a call also makes it."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: self.log.append("replay"))

    def Stream(self, name: str = "side") -> Any:
        return SimpleNamespace(name=name, wait_stream=lambda other: self.log.append(f"{name} waits for {other.name}"))

    def current_stream(self) -> Any:
        return self.Stream("current")

    def graph_pool_handle(self) -> str:
        return "pool"

    def device(self, device: torch.device) -> Any:
        return nullcontext()

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.log.append(f"enter {stream.name}")
        yield
        self.log.append(f"leave {stream.name}")

    @contextmanager
    def graph(self, graph: Any, *, pool: str, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert (pool, capture_error_mode) == ("pool", "thread_local")
        self.log.append(f"begin on {stream.name}")
        yield
        self.log.append("end")


def rounds_of(decoder: GraphDecoder) -> CompiledRounds:
    return decoder._rounds


def run(decoder: GraphDecoder, cache: KVCache, num_drafts: int = 2) -> RoundTokens:
    """A round of the first two of four layers' drafts, after token 5 in each row."""
    return decoder.round([5] * cache.num_rows, cache, DraftRequest(exit_layer=2, num_drafts=num_drafts), 4)


def tokens_of(round_: RoundTokens) -> list[list[int]]:
    return [drafts + targets for drafts, targets in zip(round_.drafts, round_.targets, strict=True)]


class TestRounds:
    def test_a_round_commits_nothing_and_can_be_run_again(self, decoder: GraphDecoder) -> None:
        cache = decoder.new_cache(3, 40)
        calls = decoder.layer_calls
        first = run(decoder, cache)
        keys = cache.keys.clone()
        again = run(decoder, cache)
        assert cache.lengths == [0, 0, 0]
        assert [len(row) for row in first.drafts] == [2, 2, 2]
        assert [len(row) for row in first.targets] == [3, 3, 3]
        assert tokens_of(again) == tokens_of(first)
        assert torch.equal(keys, cache.keys)
        assert decoder.layer_calls - calls == 2 * (3 * 2 + 4 - 2)

    def test_rows_are_rounded_up_within_the_buffers(self, decoder: GraphDecoder) -> None:
        cache = decoder.new_cache(6, 40)
        for rows, made_for in [(6, 6), (5, 6), (4, 4), (3, 4), (2, 2), (1, 1)]:
            assert len(run(decoder, cache.view(0, rows)).drafts) == rows
            assert decoder.compiled[-1].shape.num_rows == made_for
        assert len(decoder.compiled) == 4
        assert len(run(decoder, cache.view(3, 6)).drafts) == 3
        assert decoder.compiled[-1].shape.num_rows == 3

    def test_rows_of_others_are_left_alone(self, decoder: GraphDecoder) -> None:
        """A round of three rows is made for four: the fourth one's place may belong to a running row."""
        whole, alone = decoder.new_cache(6, 40), decoder.new_cache(3, 40)
        whole.keys.normal_(generator=torch.Generator().manual_seed(0))
        whole.values.normal_(generator=torch.Generator().manual_seed(1))
        for row in range(6):
            whole.commit(row, 30 + row)
        for row in range(3):
            for ours, theirs in ((alone.keys, whole.keys), (alone.values, whole.values)):
                ours[:, row] = theirs[:, 1 + row]
            alone.commit(row, 31 + row)
        keys, values = whole.keys.clone(), whole.values.clone()
        assert tokens_of(run(decoder, whole.view(1, 4))) == tokens_of(run(decoder, alone))
        assert [round_.shape.num_rows for round_ in decoder.compiled] == [4, 3]
        assert whole.lengths == [30, 31, 32, 33, 34, 35]
        for row in (0, 4, 5):  # but for the scratch slot, which nobody reads
            assert torch.equal(whole.keys[:, row, :-1], keys[:, row, :-1])
            assert torch.equal(whole.values[:, row, :-1], values[:, row, :-1])
        for row in (1, 2, 3):
            assert torch.equal(whole.keys[:, row, : 30 + row], keys[:, row, : 30 + row])

    def test_a_round_is_made_once_for_its_shape_and_buffers(self, decoder: GraphDecoder) -> None:
        cache = decoder.new_cache(1, 100)
        for num_drafts in (2, 2, 3, 2, 3):
            run(decoder, cache, num_drafts)
        assert [x.shape.num_drafts for x in decoder.compiled] == [2, 3]
        cache.commit(0, 62)  # with the round's 3 tokens: beyond 64 slots
        run(decoder, cache)
        assert [x.shape.num_slots for x in decoder.compiled] == [64, 64, 128]
        other = decoder.new_cache(1, 100)
        run(decoder, other)
        assert len(decoder.compiled) == 4

    def test_those_unused_for_longest_go_first(self, decoder: GraphDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compiled_rounds, "MOST_ROUNDS", 2)
        cache = decoder.new_cache(1, 100)
        for num_drafts in (1, 2, 1, 3, 1, 2):
            run(decoder, cache, num_drafts)
        assert [x.shape.num_drafts for x in decoder.compiled] == [1, 2, 3, 2]

    def test_it_waits_until_a_round_has_been_asked_for(self, load_decoder: Callable[..., GraphDecoder]) -> None:
        """Until then, the other verbs answer, with the same tokens."""
        decoder = load_decoder(uses_before=2)
        cache, expected, made = decoder.new_cache(1, 100), {}, []
        for num_drafts in (1, 2, 1, 1, 2, 1, 2):
            found = tokens_of(run(decoder, cache, num_drafts))
            assert found == expected.setdefault(num_drafts, found)
            made.append(len(decoder.compiled))
        assert made == [0, 0, 0, 1, 1, 1, 2]

    @pytest.mark.parametrize(
        ("options", "kinds"),
        [
            ({"stop": StopRule(rates=(1.0,) * CONFIDENCE_CLASSES, least=0.0)}, ["draft", "last", "pass"]),
            ({"draw": Draw(temperatures=(1.0,), top_k=(0,), top_p=(1.0,), min_p=(0.0,), seeds=(3,))}, ["round"]),
            ({"planned": 7}, ["draft", "last", "pass"]),  # most drafts of a whole round would be in vain
        ],
        ids=["stop", "draw", "planned"],
    )
    def test_rounds_of_no_fixed_length_are_made_of_parts(
        self, decoder: GraphDecoder, options: dict[str, Any], kinds: list[str]
    ) -> None:
        cache = decoder.new_cache(1, 40)
        round_ = decoder.round([5], cache, DraftRequest(exit_layer=2, num_drafts=3, **options), 4)
        assert len(round_.drafts[0]) == 3
        assert [made.shape.kind for made in decoder.compiled] == kinds

    def test_long_blocks_are_not_captured(self, decoder: GraphDecoder) -> None:
        cache, block = decoder.new_cache(1, 100), torch.zeros(1, 65, dtype=torch.long)
        decoder.choose(block, decoder.place(cache, [0], 65), cache, 0, 4)
        assert decoder.compiled == ()
        decoder.choose(block[:, :64], decoder.place(cache, [0], 64), cache, 0, 4)
        assert [made.shape.num_drafts for made in decoder.compiled] == [63]

    def test_drafts_of_many_lengths_share_a_graph(self, decoder: GraphDecoder) -> None:
        """Up to 15, then up to 31."""
        cache = decoder.new_cache(1, 100)
        for num_drafts in (1, 5, 15, 16, 31):
            drafts = decoder.draft(torch.tensor([[5]]), cache, DraftRequest(exit_layer=2, num_drafts=num_drafts))
            assert drafts.tokens.shape == (1, num_drafts)
        made = [(each.shape.kind, each.shape.num_drafts) for each in decoder.compiled]
        assert made == [("draft", 15), ("last", 15), ("draft", 31), ("last", 31)]

    def test_a_failure_while_drafting_leaves_the_other_verbs(
        self, decoder: GraphDecoder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stop = StopRule(rates=(0.9,) * CONFIDENCE_CLASSES, least=0.5)
        request, cache = DraftRequest(exit_layer=2, num_drafts=6, stop=stop), decoder.new_cache(1, 40)
        expected = decoder.round([5], cache, request, 4)
        rounds = rounds_of(decoder)
        rounds._programs.clear()
        prepare = rounds._prepare

        def fail_later(program: Program) -> None:
            if program.part.shape.kind == "last":
                raise RuntimeError("no graph today")
            prepare(program)

        monkeypatch.setattr(rounds, "_prepare", fail_later)
        assert decoder.round_kind == "graphs"
        with pytest.warns(RuntimeWarning, match="run uncompiled: RuntimeError: no graph today"):
            found = decoder.round([5], cache, request, 4)
        assert (tokens_of(found), decoder.round_kind) == (tokens_of(expected), "calls")
        assert found.confidences == [pytest.approx(row, rel=1e-5) for row in expected.confidences]

    def test_a_round_drafts_as_many_as_it_is_made_for(self, decoder: GraphDecoder) -> None:
        cache = decoder.new_cache(1, 40)
        expected = run(decoder, cache, 5)
        found = decoder.round([5], cache, DraftRequest(exit_layer=2, num_drafts=3, planned=5), 4)
        assert tokens_of(found) == tokens_of(expected)
        assert len(decoder.compiled) == 1

    def test_the_next_text_finds_the_rounds_of_the_last(self, decoder: GraphDecoder) -> None:
        for _ in range(3):
            cache = decoder.new_cache(1, 40)
            run(decoder, cache)
            del cache
            gc.collect()
        assert len(decoder.compiled) == 1
        run(decoder, decoder.new_cache(2, 40))
        assert [key[0].num_rows for key in rounds_of(decoder)._programs] == [2]  # the first buffers are gone

    def test_rounds_of_views_go_with_their_buffers(self, decoder: GraphDecoder) -> None:
        cache = decoder.new_cache(4, 40)
        for row in range(4):
            run(decoder, cache.view(row, row + 1))
        buffer = weakref.ref(cache.keys)
        del cache
        gc.collect()
        run(decoder, decoder.new_cache(5, 40))
        assert [key[0].num_rows for key in rounds_of(decoder)._programs] == [5]
        gc.collect()
        assert buffer() is None

    def test_capture(self, decoder: GraphDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
        """With a device that only looks like a GPU: what is called, in which order, and what a replay is given."""
        log: list[str] = []
        rounds, cache = rounds_of(decoder), decoder.new_cache(3, 40)
        expected = run(decoder, cache)
        monkeypatch.setattr(torch, "cuda", FakeCuda(log))
        inputs = RowInputs(3, torch.device("cpu"))
        program = Program(StaticRound(rounds._parts, decoder.compiled[0].shape, cache), inputs)
        inputs.fill([1, 2, 3], [0, 0, 0], 40)
        call = program._call
        monkeypatch.setattr(program, "_call", lambda: log.append("call") or call())
        program.capture(Recorder(torch.device("cpu")))
        wait = ["side waits for current"]
        warm_up = ["enter side", "call", "call", "call", "leave side", "current waits for side"]
        assert log == wait + warm_up + ["begin on side", "call", "end"]
        log.clear()
        inputs.fill([5, 5, 5], [0, 0, 0], 40)
        found = program.run()
        assert log == ["replay"]
        assert found is program._outputs  # where a replay of a real graph would have written
        assert program.inputs.tensor[:, :2].tolist() == [[5, 0]] * 3
        assert call()[:3].tolist() == tokens_of(expected)

    def test_a_failure_leaves_the_other_verbs(self, decoder: GraphDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = tokens_of(run(decoder, decoder.new_cache(1, 40), 3))
        rounds = rounds_of(decoder)
        rounds.report.clear()
        rounds._programs.clear()

        def fail(*_: Any) -> None:
            raise RuntimeError("no graph today\nand more")

        monkeypatch.setattr(rounds, "_prepare", fail)
        cache = decoder.new_cache(1, 40)
        calls = decoder.layer_calls
        with pytest.warns(RuntimeWarning, match="run uncompiled: RuntimeError: no graph today"):
            assert tokens_of(run(decoder, cache, 3)) == expected
        assert tokens_of(run(decoder, cache, 3)) == expected
        assert [x.problem for x in decoder.compiled] == ["RuntimeError: no graph today"]
        assert decoder.layer_calls - calls == 2 * (4 * 2 + 4 - 2)


class TestChoice:
    def test_a_cpu_compiles_nothing_unless_told(self, tiny_checkpoint: Callable[..., Path]) -> None:
        folder = str(tiny_checkpoint())
        for value in ("auto", "off"):
            decoder = layerskip.load(folder, device="cpu", compile=value).decoder
            assert not isinstance(decoder, GraphDecoder)
            assert decoder.provisional_rounds == 0
        decoder = layerskip.load(folder, device="cpu", compile="max").decoder
        assert isinstance(decoder, GraphDecoder)
        assert isinstance(decoder._network, TorchNetwork)

    def test_unknown_values(self, tiny_checkpoint: Callable[..., Path]) -> None:
        folder = str(tiny_checkpoint())
        for value in ("static", "fast"):
            with pytest.raises(InvalidArgumentError, match=f"compile '{value}' is not known; use auto, off or max"):
                layerskip.load(folder, compile=value)
        with pytest.raises(InvalidArgumentError, match="kernels 'native' has none"):
            layerskip.load(folder, device="cpu", kernels="native", compile="max")

    def test_without_a_compiler(self, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compiled_rounds, "which", lambda name: None)
        with pytest.raises(InvalidArgumentError, match=r"can't be used here: torch\.compile needs a C\+\+ compiler"):
            layerskip.load(str(tiny_checkpoint()), device="cpu", compile="max")


def test_rounds_that_will_be_faster_are_told(load_decoder: Callable[..., GraphDecoder]) -> None:
    """Those before a shape is compiled, and the one that compiles it."""
    decoder = load_decoder(uses_before=2)
    cache = decoder.new_cache(1, 20)
    counts = []
    for _ in range(5):
        run(decoder, cache, 3)
        counts.append(decoder.provisional_rounds)
    assert counts == [1, 2, 3, 3, 3]
    run(decoder, cache, 4)
    assert decoder.provisional_rounds == 4


def test_adaptive_decoding_learns_no_times_of_such_rounds(load_decoder: Callable[..., GraphDecoder]) -> None:
    seen: list[bool] = []

    class Watching:
        def prepare(self, view: BatchView) -> None:
            pass

        def plan(self, view: BatchView) -> Plan:
            return Plan(source="layers", exit_layer=2, num_speculations=2)

        def observe(self, plan: Plan, result: RoundResult) -> None:
            seen.append(result.settled)

    drain(start(load_decoder(uses_before=3), [[5, 9]], max_new_tokens=40, policy=Watching()))
    while not seen[-1]:  # the last drafts of a row that ends are made one by one
        seen.pop()
    assert len(seen) > 6
    assert seen == [False] * 4 + [True] * (len(seen) - 4)


def test_attention_on_cuda_needs_no_plans_of_cudnn(decoder: GraphDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    network = decoder._network
    assert isinstance(network, TorchNetwork)
    allowed: list[bool] = []

    def run_layer(index: int, hidden: torch.Tensor, positions: Any, cache: Any) -> torch.Tensor:
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return hidden

    monkeypatch.setattr(network, "_run_layer", run_layer)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    for on_cpu in (True, False):
        monkeypatch.setattr(network, "_on_cpu", on_cpu)
        network.run_layers(torch.zeros(1, 1, 32), SimpleNamespace(), decoder.new_cache(1, 8), 0, 1)  # type: ignore[arg-type]
    assert allowed == [before, False]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.slow
@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.skipif(compiled_rounds.why_not_compile(torch.device("cpu")) is not None, reason="there is no compiler")
def test_torch_compile(tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, on_cpu: bool) -> None:
    """Two shapes of one function, which torch.compile takes for recompilations; the same texts as without it.

    Also with the operators that the layers use on CUDA, which the compiler must see through as well.
    """
    monkeypatch.setattr(compiled_rounds, "USES_BEFORE", 0)
    folder = tiny_checkpoint("gemma3_text", num_hidden_layers=2)
    lm = layerskip.load(str(folder), device="cpu", compile="max")
    assert isinstance(lm.decoder, GraphDecoder)
    monkeypatch.setattr(lm.decoder._network, "_on_cpu", on_cpu)
    plain = layerskip.load(str(folder), device="cpu", kernels="torch")
    options: dict[str, Any] = {"max_new_tokens": 16, "ignore_eos": True}
    expected = plain.generate([[5, 9], [7]], generation_strategy="autoregressive", **options)
    for drafting in ({"generation_strategy": "autoregressive"}, {"exit_layer": 1, "num_speculations": 2}):
        found = lm.generate([[5, 9], [7]], **drafting, **options)
        assert [x.token_ids for x in found] == [x.token_ids for x in expected]
    assert [(x.shape.num_drafts, x.problem) for x in lm.decoder.compiled] == [(0, None), (2, None)]
    assert all(x.seconds > 0.1 for x in lm.decoder.compiled)
