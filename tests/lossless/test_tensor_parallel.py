"""Ranks that share a network write the texts of plain decoding by the same ranks, and of one process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import write_tiny_adapters
from rank_work import PLAIN, PROMPTS, RULES, SERVED, TOKENS, guided_texts, write_by_rejection
from ranks import run_ranks
from tiny import write_agreeing, write_tiny

import layerskip
from layerskip.decoding.config import make_config
from layerskip.evaluation.verify.compare import LOGIT_TOLERANCE, compare
from layerskip.language_model import LanguageModel
from layerskip.model.config.families import FAMILIES
from layerskip.model.native.library import load_library

TOLERANCE = LOGIT_TOLERANCE[torch.float32]
OF_EACH_KIND = ("llama", "gemma3_text", "phi3", "olmo2", "qwen3_moe", "agreeing")
"""Separate and fused weights, norms everywhere, norms over all heads, experts."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model of every family, and one whose drafts are accepted now and then."""
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        write_tiny(folder / family, family)
    (folder / "agreeing").mkdir()
    write_agreeing(folder / "agreeing")
    return {name: str(folder / name) for name in (*FAMILIES, "agreeing")}


def judge(lm: LanguageModel, rules: str, expected: list[list[int]], actual: list[list[int]]) -> None:
    """Texts are equal, or differ first where both tokens are about as good."""
    config = make_config(None, {"max_new_tokens": TOKENS, **RULES[rules]})
    for index, (prompt, one, other) in enumerate(zip(PROMPTS, expected, actual, strict=True)):
        divergence = compare(lm, config, index, prompt, one, other, TOLERANCE)
        assert divergence is None or divergence.near_tie, (rules, divergence)


@pytest.mark.parametrize(("num_ranks", "kernels"), [(2, "native"), (2, "torch"), (4, "torch")])
def test_every_way_to_decode_writes_the_text_of_one_process(
    models: dict[str, str], tmp_path: Path, num_ranks: int, kernels: str
) -> None:
    """One test for all models, since starting processes takes longer than most of what they do."""
    if kernels == "native" and load_library() is None:
        pytest.skip("the compiled kernels weren't built")
    tried = models if kernels == "native" else {name: models[name] for name in OF_EACH_KIND}
    thorough = ["agreeing"] if num_ranks == 2 else []
    work = "rank_work:write_texts"
    texts = run_ranks(tmp_path, num_ranks, work, models=tried, all_exits=thorough, kernels=kernels)
    assert all(other == texts[0] for other in texts[1:])
    for name, by_rules in texts[0].items():
        lm = layerskip.load(models[name], device="cpu", dtype="float32")
        if name in thorough:
            assert by_rules.pop("rejection") == write_by_rejection(lm)
        for rules, by_way in by_rules.items():
            results = lm.generate(PROMPTS, max_new_tokens=TOKENS, **RULES[rules], **PLAIN)
            alone = [result.token_ids for result in results]
            for written in by_way.values():
                assert len(written[0]) == TOKENS
                judge(lm, rules, alone, written)
                judge(lm, rules, by_way["plain"], written)


def test_drafts_that_were_accepted_and_rejected_are_among_them(models: dict[str, str], tmp_path: Path) -> None:
    """Without both, equality would prove little."""
    lm = layerskip.load(models["agreeing"], device="cpu", dtype="float32")
    (result,) = lm.generate([PROMPTS[1]], max_new_tokens=20, exit_layer=2, num_speculations=4)
    assert 0 < result.stats.accepted < result.stats.drafted


@pytest.mark.parametrize(
    ("num_ranks", "options"),
    [(4, {}), (2, {"quantize_draft": "int8"}), (2, {"draft_vocabulary": 20, "replicate_layers": 2})],
    ids=str,
)
def test_drafts_by_adapters_and_other_weights(
    models: dict[str, str], tmp_path: Path, num_ranks: int, options: dict[str, Any]
) -> None:
    adapters = write_tiny_adapters(
        tmp_path / "adapters",
        Path(models["agreeing"]),
        [2, 3],
        tokens=range(3, 40, 2),
        reads_values="replicate_layers" not in options,
    )
    (tmp_path / "ranks").mkdir()
    texts = run_ranks(
        tmp_path / "ranks",
        num_ranks,
        "rank_work:write_texts",
        models={"agreeing": models["agreeing"]},
        all_exits=[],
        exit_adapters=str(adapters),
        **options,
    )
    assert all(other == texts[0] for other in texts[1:])
    lm = layerskip.load(models["agreeing"], device="cpu", dtype="float32")
    for rules, by_way in texts[0]["agreeing"].items():
        alone = [r.token_ids for r in lm.generate(PROMPTS, max_new_tokens=TOKENS, **RULES[rules], **PLAIN)]
        for written in by_way.values():
            judge(lm, rules, alone, written)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_constraints_and_log_probabilities(models: dict[str, str], tmp_path: Path, num_ranks: int) -> None:
    """Masks of each rank's part of the vocabulary; log-probabilities over the whole of it."""
    ways: dict[str, dict[str, Any]] = {
        "plain": PLAIN,
        "layers": {"exit_layer": 2, "num_speculations": 4},
        "text": {"generation_strategy": "ngram"},
        "sampled": {"exit_layer": 3, "temperature": 0.9, "top_p": 0.9, "seed": 4},
        "rejection": {"exit_layer": 2, "temperature": 0.9, "seed": 4, "acceptance": "rejection"},
    }
    found = run_ranks(tmp_path, num_ranks, "rank_work:write_guided", model=models["agreeing"], ways=ways)
    assert all(other == found[0] for other in found[1:])
    lm = layerskip.load(models["agreeing"], device="cpu", dtype="float32")
    expected = json.loads(json.dumps(guided_texts(lm, ways)))
    for way, rows in expected.items():
        for ours, theirs in zip(found[0][way], rows, strict=True):
            assert ours["tokens"] == theirs["tokens"], way
            assert ours["prompt"][0] is theirs["prompt"][0] is None
            told = ([*each["logprobs"], *each["prompt"][1:]] for each in (ours, theirs))
            for one, other in zip(*told, strict=True):
                assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-4)
                assert [token for token, _ in one["top"]] == [token for token, _ in other["top"]]
    assert found[0]["plain"][1]["tokens"] == found[0]["layers"][1]["tokens"] == found[0]["text"][1]["tokens"]


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_an_engine_that_serves_reads_the_same_chunks_in_all_ranks(
    models: dict[str, str], tmp_path: Path, kernels: str
) -> None:
    """Though they follow from times, of which each rank measures its own; what blocks hold is found in all ranks."""
    if kernels == "native" and load_library() is None:
        pytest.skip("the compiled kernels weren't built")
    model = models["agreeing"]
    ranks = run_ranks(tmp_path, 2, "rank_work:serve", model=model, seconds_of_others=0.01, kernels=kernels)
    assert ranks[0] == ranks[1]
    assert len(ranks[0]["chunks"]) > 8
    assert ranks[0]["cached"][4:] == [0, 56, 60, 16]
    lm = layerskip.load(model, device="cpu", dtype="float32", kernels=kernels)
    for number, text in enumerate(ranks[0]["texts"]):
        turn, options = number // 4, SERVED[number % 4]
        prompt = [*(5 + place % 40 for place in range((3, 60, 61, 20)[number % 4] - 1)), 1]
        rules = {"seed": turn, "temperature": 0.8 * turn, "acceptance": "coupled"}
        assert lm.generate([prompt], max_new_tokens=TOKENS, **rules, **options)[0].token_ids == text
