"""Ranks that share a network write the texts of plain decoding by the same ranks, and of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import write_tiny_adapters
from rank_work import PLAIN, PROMPTS, RULES, TOKENS
from ranks import run_ranks
from tiny import write_agreeing, write_tiny

import layerskip
from layerskip.decoding.config import make_config
from layerskip.evaluation.verify.compare import LOGIT_TOLERANCE, compare
from layerskip.language_model import LanguageModel
from layerskip.model.config.families import FAMILIES
from layerskip.model.native.library import load_library

TOLERANCE = LOGIT_TOLERANCE[torch.float32]
RANKS = (2, 4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model of every family, and one whose drafts are accepted now and then."""
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        write_tiny(folder / family, family)
    (folder / "agreeing").mkdir()
    write_agreeing(folder / "agreeing")
    return {name: str(folder / name) for name in (*FAMILIES, "agreeing")}


@pytest.fixture(scope="module", params=[(2, "native"), (4, "torch")], ids=str)
def texts(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    """What each rank has written."""
    num_ranks, kernels = request.param
    if kernels == "native" and load_library() is None:
        pytest.skip("the compiled kernels weren't built")
    folder = tmp_path_factory.mktemp("ranks")
    work = "rank_work:write_texts"
    return run_ranks(folder, num_ranks, work, models=models, all_exits=["agreeing"], kernels=kernels)


def judge(lm: LanguageModel, rules: str, expected: list[list[int]], actual: list[list[int]]) -> None:
    """Texts are equal, or differ first where both tokens are about as good."""
    config = make_config(None, {"max_new_tokens": TOKENS, **RULES[rules]})
    for index, (prompt, one, other) in enumerate(zip(PROMPTS, expected, actual, strict=True)):
        divergence = compare(lm, config, index, prompt, one, other, TOLERANCE)
        assert divergence is None or divergence.near_tie, (rules, divergence)


def test_all_ranks_write_the_same(texts: list[Any]) -> None:
    assert all(other == texts[0] for other in texts[1:])


@pytest.mark.parametrize("name", [*FAMILIES, "agreeing"])
def test_every_way_to_decode_writes_the_text_of_one_process(
    texts: list[Any], models: dict[str, str], name: str
) -> None:
    lm = layerskip.load(models[name], device="cpu", dtype="float32")
    for rules, by_way in texts[0][name].items():
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


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize(
    "options", [{}, {"quantize_draft": "int8"}, {"draft_vocabulary": 20, "replicate_layers": 2}], ids=str
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
