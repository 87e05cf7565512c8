"""What ranks exchange, and what each of them has."""

from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from tiny import write_tiny

import layerskip
from layerskip.errors import InvalidArgumentError

STEPS, DRAFTS, EXIT = 6, 2, 1
LAYERS, WIDTH, NUMBER = 4, 32, 4  # of the tiny model; bytes of a float


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    write_tiny(folder, hidden_size=WIDTH, num_hidden_layers=LAYERS)
    return str(folder)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 1}], ids=["greedy", "sampled"])
def test_a_step_takes_two_reductions_a_layer_one_for_the_embedding_and_a_constant_for_the_token(
    model: str, tmp_path: Path, sampling: dict[str, Any]
) -> None:
    for counted in run_ranks(
        tmp_path,
        2,
        "rank_work:count_traffic",
        model=model,
        steps=STEPS,
        generation_strategy="autoregressive",
        **sampling,
    ):
        assert counted["sums"] == STEPS * (2 * LAYERS + 1)
        assert counted["sum_bytes"] == STEPS * (2 * LAYERS + 1) * WIDTH * NUMBER
        assert counted["others"] == STEPS
        assert counted["other_bytes"] == STEPS * 2 * 8  # a score and a token


@pytest.mark.parametrize("num_whole", [0, EXIT], ids=["cut", "whole first layers"])
def test_a_round_takes_two_reductions_for_each_layer_that_it_enters(model: str, tmp_path: Path, num_whole: int) -> None:
    options = {"exit_layer": EXIT, "num_speculations": DRAFTS, "replicate_layers": num_whole}
    counted, other = run_ranks(tmp_path, 2, "rank_work:count_traffic", model=model, steps=3 * STEPS, **options)
    assert counted == other
    calls = counted["calls"]
    assert {(start, stop) for start, stop, *_ in calls} >= {(0, EXIT), (EXIT, LAYERS)}
    sums, rows = 0, 0
    for start, stop, num_rows, num_queries in calls:
        reductions = 2 * (stop - max(start, num_whole)) + (start == 0)  # and one for the embedding
        sums += reductions
        rows += reductions * num_rows * num_queries
    assert counted["sums"] == sums
    assert counted["sum_bytes"] == rows * WIDTH * NUMBER
    # A score and a token for each draft and each target: K + 1 passes begin in a round, and it chooses K + 1 times.
    choices = sum(start == 0 for start, *_ in calls)
    assert counted["others"] == choices
    assert counted["other_bytes"] <= 2 * 8 * (choices + counted["rounds"] * (DRAFTS + 1))


@pytest.mark.parametrize(
    "options",
    [
        {"acceptance": "rejection", "temperature": 0.9, "exit_layer": 2, "num_speculations": 3},
        {"generation_strategy": "autoregressive", "temperature": 0.9, "repetition_penalty": 1.2},
        {"generation_strategy": "autoregressive", "do_sample": True, "top_k": 50, "min_p": 0.01},
    ],
    ids=["rejection", "penalty", "filters"],
)
def test_no_logits_are_gathered_to_choose_tokens(tmp_path: Path, options: dict[str, Any]) -> None:
    vocabulary = 8192
    (tmp_path / "model").mkdir()
    (tmp_path / "ranks").mkdir()
    write_tiny(tmp_path / "model", vocab_size=vocabulary)
    for counted in run_ranks(
        tmp_path / "ranks", 2, "rank_work:count_traffic", model=str(tmp_path / "model"), steps=STEPS, seed=1, **options
    ):
        assert 0 < counted["other_bytes"] < STEPS * vocabulary * NUMBER / 4


@pytest.mark.parametrize(("num_ranks", "most"), [(2, 0.55), (4, 0.3)])
def test_each_rank_has_its_share_of_the_weights(tmp_path: Path, num_ranks: int, most: float) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 8, "vocab_size": 2048}
    (tmp_path / "model").mkdir()
    (tmp_path / "ranks").mkdir()
    write_tiny(tmp_path / "model", "llama", num_key_value_heads=4, **sizes)
    lm = layerskip.load(str(tmp_path / "model"), kernels="torch")
    whole = lm.decoder.weight_bytes(0, LAYERS) + 2048 * 128 * 4
    for found in run_ranks(tmp_path / "ranks", num_ranks, "rank_work:sizes", models={"llama": str(tmp_path / "model")}):
        assert found["llama"] <= most * whole


def test_the_embedded_model_is_cut_into_four_though_it_has_three_heads(tmp_path: Path) -> None:
    decoder = layerskip.load("demo").decoder
    whole = decoder.weight_bytes(0, decoder.num_layers)
    for found in run_ranks(tmp_path, 4, "rank_work:sizes", models={"demo": "demo"}):
        assert found["demo"] <= 0.3 * whole


def test_layers_that_are_replicated_belong_to_tensor_parallelism(model: str) -> None:
    with pytest.raises(InvalidArgumentError, match="replicate_layers 2 is for tensor_parallel"):
        layerskip.load(model, replicate_layers=2)


def test_tensor_parallel_needs_a_process_group(model: str) -> None:
    with pytest.raises(
        InvalidArgumentError, match="tensor_parallel 2 needs as many processes: start them with torchrun"
    ):
        layerskip.load(model, tensor_parallel=2)


@pytest.mark.parametrize("number", [0, -1, 1.5, "2"])
def test_a_number_of_ranks_that_is_none_is_refused(model: str, number: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="tensor_parallel"):
        layerskip.load(model, tensor_parallel=number)
