"""Drafts through exit adapters: the text stays the model's own, and every token has the keys that drafting needs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import write_tiny_adapters
from engines import cache_of, drain, start
from layers import Entry, entries_of
from tiny import write_tiny

import layerskip
from layerskip.errors import InvalidArgumentError
from layerskip.language_model import LanguageModel
from layerskip.model.decoders.graphs import GraphDecoder
from layerskip.model.drafts import DraftRequest
from layerskip.model.native.library import load_library
from layerskip.model.positions import ValueSource

EXITS = (1, 3)
LAYERS = 5
SAMPLED = {"temperature": 0.9, "top_k": 12, "seed": 5}
RULES: list[dict[str, Any]] = [{}, SAMPLED, {"repetition_penalty": 1.2}]
WAYS: list[dict[str, Any]] = [
    {"exit_layer": 1, "num_speculations": 1},
    {"exit_layer": 1, "num_speculations": 4},
    {"exit_layer": 2, "num_speculations": 3},
    {"exit_layer": 3, "num_speculations": 6},
    {"exit_layer": 5, "num_speculations": 2},
    {"generation_strategy": "ngram", "num_speculations": 3},
    {"generation_strategy": "autoregressive"},
    {},
]
"""Drafts through either adapter, at exits before, between and after them, and none."""


@pytest.fixture(scope="module")
def folders(lm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters that draft any token, some tokens only, and without values of later layers."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        "all": write_tiny_adapters(root / "all", lm_folder, EXITS),
        "some": write_tiny_adapters(root / "some", lm_folder, EXITS, tokens=range(0, 48, 2)),
        "state": write_tiny_adapters(root / "state", lm_folder, EXITS, reads_values=False),
    }


@pytest.fixture(scope="module", params=["torch", "native", "static"])
def reload(
    lm_folder: Path, load_static: Callable[..., LanguageModel], request: pytest.FixtureRequest
) -> Callable[..., LanguageModel]:
    """Loads one network with or without adapters."""
    if request.param == "native" and load_library() is None:
        pytest.skip("the compiled kernels weren't built")

    def load(adapters: Path | None = None, **options: Any) -> LanguageModel:
        if request.param == "static":
            return load_static(lm_folder, exit_adapters=adapters, **options)
        kernels, folder = request.param, str(lm_folder)
        return layerskip.load(folder, dtype="float32", device="cpu", kernels=kernels, exit_adapters=adapters, **options)

    return load


def written(lm: LanguageModel, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    return [result.token_ids for result in lm.generate(prompts, max_new_tokens=30, **options)]


@pytest.mark.parametrize("kind", ["all", "some", "state"])
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_the_text_is_the_models_own(
    reload: Callable[..., LanguageModel],
    folders: dict[str, Path],
    prompts: list[list[int]],
    kind: str,
    rules: dict[str, Any],
) -> None:
    lm, plain = reload(folders[kind]), reload()
    assert lm.decoder.adapted_exits == EXITS
    expected = written(plain, prompts, generation_strategy="autoregressive", **rules)
    accepted = 0
    for way in WAYS:
        results = lm.generate(prompts, max_new_tokens=30, **way, **rules)
        assert [result.token_ids for result in results] == expected, way
        accepted += sum(result.stats.accepted for result in results if way.get("exit_layer") in EXITS)
        assert [written(lm, [prompt], **way, **rules)[0] for prompt in prompts] == expected, way
    assert accepted > 0


def test_the_models_logits_are_bit_for_bit_those_without_adapters(
    reload: Callable[..., LanguageModel], folders: dict[str, Path], prompts: list[list[int]]
) -> None:
    lm, plain = reload(folders["all"]), reload()
    for prompt in prompts:
        assert torch.equal(lm.logits(prompt), plain.logits(prompt))


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("rules", RULES[::2], ids=str)
def test_adapters_have_the_keys_of_every_token(
    reload: Callable[..., LanguageModel],
    folders: dict[str, Path],
    prompts: list[list[int]],
    way: dict[str, Any],
    rules: dict[str, Any],
) -> None:
    lm = reload(folders["all"])
    engine = start(lm.decoder, [prompts[1]], max_new_tokens=20, **way, **rules)
    cache, row, length = cache_of(engine), engine.rows[0], len(prompts[1]) + 19
    drain(engine)
    read = start(lm.decoder, [row.tokens[:-1]], max_new_tokens=1, generation_strategy="autoregressive")
    whole = cache_of(read)
    drain(read)
    assert cache.keys.shape[0] == LAYERS + len(EXITS)
    for ours, theirs in ((cache.keys, whole.keys), (cache.values, whole.values)):
        torch.testing.assert_close(ours[:, 0, :length], theirs[:, 0, :length], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("exit_layer", EXITS)
@pytest.mark.parametrize("num_speculations", [1, 3])
def test_a_round_runs_the_adapter_once_for_each_token(
    reload: Callable[..., LanguageModel], folders: dict[str, Path], exit_layer: int, num_speculations: int
) -> None:
    lm, log = reload(folders["all"]), list[Entry]()
    prompt = [3, 1, 4, 1, 5, 9]
    engine = start(lm.decoder, [prompt], max_new_tokens=17, exit_layer=exit_layer, num_speculations=num_speculations)
    engine.step()
    lm.decoder.calls.observer = entries_of(log)
    try:
        for event in iter(lambda: engine.step()[0] if engine.rows else None, None):
            k = len(event.drafts)
            if isinstance(lm.decoder, GraphDecoder) and 2 * k >= num_speculations:
                k = num_speculations
            adapter = LAYERS + EXITS.index(exit_layer)
            assert len(log) == (k + 1) * (exit_layer + (k > 0)) + LAYERS - exit_layer
            assert [layer for layer, _, _ in log].count(adapter) == (k + 1) * (k > 0)
            log.clear()
    finally:
        lm.decoder.calls.observer = None


@pytest.mark.parametrize("exit_layer", EXITS)
def test_drafts_read_what_later_layers_know_of_the_last_committed_token(
    reload: Callable[..., LanguageModel], folders: dict[str, Path], prompts: list[list[int]], exit_layer: int
) -> None:
    decoder = reload(folders["all"]).decoder
    prompt, first = prompts[1], len(prompts[1])
    cache = decoder.new_cache(1, first + 8)
    decoder.choose(torch.tensor([prompt]), decoder.place(cache, [0], first), cache, 0, LAYERS)
    cache.commit(0, first)
    token = torch.tensor([[7]])
    drafts = decoder.draft(token, cache, DraftRequest(exit_layer=exit_layer, num_drafts=4)).tokens[0].tolist()
    expected = []
    for offset in range(4):
        positions = decoder.place(cache, [first + offset], 1)
        hidden = decoder.run_layers(decoder.embed(token), positions, cache, 0, exit_layer)
        sources = positions.source_slots(cache.lengths, ValueSource.COMMITTED)
        assert sources == [[first - 1]]
        state = decoder.adapt(hidden, positions, cache, exit_layer, ValueSource.COMMITTED)
        token = decoder.unembed(state, exit_layer).argmax(-1)
        expected.append(token.item())
    assert drafts == expected
    for other in (ValueSource.BEFORE, ValueSource.NONE):  # another token's values, or none, make another state
        assert not torch.allclose(state, decoder.adapt(hidden, positions, cache, exit_layer, other), atol=1e-4)


def test_reading_a_text_gives_adapters_the_values_of_each_token_before(
    reload: Callable[..., LanguageModel], folders: dict[str, Path], prompts: list[list[int]]
) -> None:
    lm, prompt = reload(folders["all"]), prompts[2]
    whole = lm.logits(prompt, exit_layer=3)
    decoder = lm.decoder
    cache = decoder.new_cache(1, len(prompt))
    for place, token in enumerate(prompt):  # one by one, as a text is written
        positions = decoder.place(cache, [place], 1)
        embedded = decoder.embed(torch.tensor([[token]]))
        _, states = decoder.run_exits(embedded, positions, cache, 0, LAYERS, [3])
        cache.commit(0, 1)
        torch.testing.assert_close(decoder.unembed(states[3], 3)[0, 0], whole[place], rtol=1e-4, atol=1e-4)


def test_early_exit_reads_no_values_of_layers_that_never_run(
    reload: Callable[..., LanguageModel], folders: dict[str, Path], prompts: list[list[int]]
) -> None:
    lm = reload(folders["all"])
    early = {"generation_strategy": "early_exit", "exit_layer": 3}
    expected = written(lm, prompts, **early)
    written(lm, prompts)  # leaves values in buffers that are used again
    assert written(lm, prompts, **early) == expected
    assert [written(lm, [prompt], **early)[0] for prompt in prompts] == expected


def test_early_exit_reads_through_the_adapter(
    reload: Callable[..., LanguageModel], folders: dict[str, Path], prompts: list[list[int]]
) -> None:
    lm, plain = reload(folders["state"]), reload()
    adapted = written(lm, prompts, generation_strategy="early_exit", exit_layer=3)
    assert adapted == [written(lm, [prompt], generation_strategy="early_exit", exit_layer=3)[0] for prompt in prompts]
    assert adapted != written(plain, prompts, generation_strategy="early_exit", exit_layer=3)
    text = [*prompts[1], *adapted[1]]
    likeliest = lm.logits(text, exit_layer=3).argmax(-1).tolist()
    assert likeliest[len(prompts[1]) - 1 : -1] == adapted[1]


@pytest.mark.parametrize("options", [{"acceptance": "rejection"}, {"acceptance": "rejection", "top_p": 0.9}])
def test_a_smaller_head_drafts_by_rejection_sampling_too(
    reload: Callable[..., LanguageModel], folders: dict[str, Path], prompts: list[list[int]], options: dict[str, Any]
) -> None:
    lm = reload(folders["some"])
    results = lm.generate(prompts, exit_layer=1, max_new_tokens=30, do_sample=True, seed=3, **options)
    assert all(len(result.token_ids) == 30 for result in results)
    assert sum(result.stats.accepted for result in results) > 0


def test_a_session_keeps_the_adapters_keys(
    reload: Callable[..., LanguageModel], folders: dict[str, Path], prompts: list[list[int]]
) -> None:
    lm, plain = reload(folders["all"]), reload()
    session, text, others = lm.new_session(), list(prompts[2]), 0
    for turn in range(3):
        way = WAYS[turn]
        result = lm.stream([text], session=session, max_new_tokens=8, **way).run()[0]
        assert result.token_ids == written(plain, [text], generation_strategy="autoregressive")[0][:8]
        others += result.stats.accepted
        text += [*result.token_ids, turn + 1]


def test_models_with_experts_can_not_have_adapters(tmp_path: Path) -> None:
    write_tiny(tmp_path / "dense")
    write_tiny(tmp_path / "sparse", "mixtral")
    adapters = write_tiny_adapters(tmp_path / "adapters", tmp_path / "dense", [1])
    with pytest.raises(InvalidArgumentError, match="sparse \\(mixtral\\) has layers with experts"):
        layerskip.load(str(tmp_path / "sparse"), exit_adapters=adapters)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3_text", "phi3", "mistral", "olmo2", "granite", "smollm3"])
@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_every_family_can_have_adapters(tmp_path: Path, family: str, kernels: str) -> None:
    if kernels == "native" and load_library() is None:
        pytest.skip("the compiled kernels weren't built")
    write_tiny(tmp_path / "model", family)
    adapters = write_tiny_adapters(tmp_path / "adapters", tmp_path / "model", [1, 2])
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kernels": kernels}
    plain = layerskip.load(str(tmp_path / "model"), **options)
    lm = layerskip.load(str(tmp_path / "model"), exit_adapters=adapters, **options)
    prompts = [[5], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]]
    expected = written(plain, prompts, generation_strategy="autoregressive")
    for exit_layer in (1, 2, 3):
        assert written(lm, prompts, exit_layer=exit_layer, num_speculations=3) == expected
