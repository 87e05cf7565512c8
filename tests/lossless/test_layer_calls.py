"""What a generation costs: every token runs through every layer once, and the early layers never twice."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from layers import Entry, entries_of
from torch import Tensor

import layerskip
from layerskip.decoding.event import Event
from layerskip.language_model import LanguageModel
from layerskip.model.cache import KVCache
from layerskip.model.decoders.graphs import GraphDecoder
from layerskip.model.native.library import load_library
from layerskip.model.torch.network import TorchNetwork

LAYERS = 5
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.mark.parametrize("exit_layer", [1, 2, 4, 5])
@pytest.mark.parametrize("num_speculations", [1, 3, 4])
def test_a_round_of_k_drafts_costs_k_plus_1_times_e_and_the_rest_once(
    lm: LanguageModel,
    rounds_of: Callable[..., list[Event]],
    layer_log: list[Entry],
    exit_layer: int,
    num_speculations: int,
) -> None:
    options = {"exit_layer": exit_layer, "num_speculations": num_speculations, "max_new_tokens": 18}
    drafted = [len(event.drafts) for event in rounds_of(lm, PROMPT, **options)]
    layer_log.clear()
    (result,) = lm.generate([PROMPT], **options)
    expected = [(layer, 1, len(PROMPT)) for layer in range(LAYERS)]
    if isinstance(lm.decoder, GraphDecoder):  # drafts as many as it is made for, unless most would be in vain
        drafted = [k if 2 * k < num_speculations else num_speculations for k in drafted]
    for k in drafted:
        expected += [(layer, 1, 1) for _ in range(k + 1) for layer in range(exit_layer)]
        expected += [(layer, 1, k + 1) for layer in range(exit_layer, LAYERS)]
    assert layer_log == expected
    cost = LAYERS + sum((k + 1) * exit_layer + LAYERS - exit_layer for k in drafted)
    assert result.stats.layer_calls == cost == len(layer_log)
    assert result.stats.rounds == len(drafted)


@pytest.mark.parametrize("exit_layer", [None, 1, 3])
def test_plain_decoding_costs_its_depth_a_token(
    lm: LanguageModel, layer_log: list[Entry], exit_layer: int | None
) -> None:
    depth = exit_layer or LAYERS
    strategy = "autoregressive" if exit_layer is None else "early_exit"
    options = {"generation_strategy": strategy, "exit_layer": exit_layer, "max_new_tokens": 6}
    (result,) = lm.generate([PROMPT], **options)
    expected = [(layer, 1, len(PROMPT)) for layer in range(depth)]
    expected += [(layer, 1, 1) for _ in range(5) for layer in range(depth)]
    assert layer_log == expected
    assert result.stats.layer_calls == 6 * depth


def test_a_batch_enters_each_layer_once_for_all_rows(lm: LanguageModel, layer_log: list[Entry]) -> None:
    prompts = [PROMPT, PROMPT[:3]]
    results = lm.generate(prompts, exit_layer=2, num_speculations=3, max_new_tokens=9)
    assert results[0].stats.layer_calls <= len(layer_log)
    assert max(result.stats.layer_calls for result in results) == len(layer_log)
    assert Counter(rows for _, rows, _ in layer_log)[2] > 0
    assert layer_log[0] == (0, 2, len(PROMPT))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True},
        {"do_sample": True, "acceptance": "rejection"},
        {"do_sample": True, "acceptance": "rejection", "block_verification": False},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 1},
    ],
    ids=str,
)
def test_with_all_layers_every_draft_holds(
    lm: LanguageModel, rounds_of: Callable[..., list[Event]], options: dict[str, Any]
) -> None:
    """Draft and target are the same then, noise and contexts included, and a round drafts what may still be written."""
    rounds = rounds_of(lm, PROMPT, exit_layer=LAYERS, num_speculations=4, max_new_tokens=30, **options)
    assert [(len(event.drafts), event.num_accepted) for event in rounds] == [(4, 4)] * 5 + [(3, 3)]


WAYS: list[dict[str, Any]] = [
    {"generation_strategy": "autoregressive"},
    {"generation_strategy": "early_exit", "exit_layer": 3},
    {"exit_layer": 2, "num_speculations": 4},
    {"exit_layer": LAYERS, "num_speculations": 3},
    {"exit_layer": 2, "num_speculations": 4, "temperature": 0.9},
    {"exit_layer": 2, "num_speculations": 4, "repetition_penalty": 1.2},
    {"exit_layer": 2, "num_speculations": 4, "do_sample": True, "acceptance": "rejection"},
    {"generation_strategy": "ngram"},
    {"generation_strategy": "adaptive"},
]


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("kernels", ["torch", "static", "draft vocabulary"])
def test_what_is_counted_is_what_a_network_runs(
    make_lm: Callable[..., LanguageModel], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], kernels: str
) -> None:
    """Drafts with fewer tokens run in a network of their own, and are counted with the others."""
    lm = make_lm(kernels="torch" if kernels == "draft vocabulary" else kernels)
    if kernels == "draft vocabulary":
        lm = layerskip.load(str(lm.checkpoint.hugging_face_folder), device="cpu", kernels="torch", draft_vocabulary=20)
    counted: list[Entry] = []
    ran: list[Entry] = []
    run_layer = TorchNetwork._run_layer

    def spy(self: TorchNetwork, index: int, hidden: Tensor, positions: Any, cache: KVCache) -> Tensor:
        ran.append((index, *hidden.shape[:2]))
        return run_layer(self, index, hidden, positions, cache)

    if options.get("generation_strategy") == "adaptive":
        lm._experience.recall(1)
        lm._experience.look(1, 1000.0)  # measures costs, uncounted; otherwise while tokens are generated
    monkeypatch.setattr(TorchNetwork, "_run_layer", spy)
    lm.decoder.calls.observer = entries_of(counted)
    (result,) = lm.generate([PROMPT], max_new_tokens=40, seed=1, **options)
    assert counted == ran
    assert result.stats.layer_calls == len(ran)


@pytest.mark.skipif(load_library() is None, reason="the compiled kernels weren't built")
@pytest.mark.parametrize("options", WAYS[:-1], ids=str)
def test_kernels_count_as_torch_does(make_lm: Callable[..., LanguageModel], options: dict[str, Any]) -> None:
    """What runs inside of a call into compiled code can't be seen from here: the same tokens enter the same layers."""
    logs, texts = [], []
    for kernels in ("native", "torch"):
        lm, log = make_lm(kernels=kernels), list[Entry]()
        lm.decoder.calls.observer = entries_of(log)
        texts.append([r.token_ids for r in lm.generate([PROMPT, PROMPT[:3]], max_new_tokens=40, seed=1, **options)])
        logs.append(log)
    assert texts[0] == texts[1]
    assert logs[0] == logs[1]
