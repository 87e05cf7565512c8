"""Results of a batch while they come: what goes on, and what is refused."""

from pathlib import Path

import pytest

from layerskip.batch.results import PartialResults
from layerskip.decoding.config import GenerationConfig
from layerskip.errors import InvalidArgumentError

GREEDY = GenerationConfig(max_new_tokens=8)


def test_results_of_another_configuration_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    PartialResults(output, GREEDY, {"input": "a", "top_k": 0}).add([{"index": 0, "text": "x"}])
    with pytest.raises(InvalidArgumentError, match=r"another configuration \(input 'a', not 'b'\)"):
        PartialResults(output, GREEDY, {"input": "b", "top_k": 0})
    assert list(PartialResults(output, GREEDY, {"input": "a", "top_k": 0}).offsets) == [0]
    partial_file = tmp_path / "out.jsonl.partial.jsonl"
    partial_file.write_text("my notes\n")
    with pytest.raises(InvalidArgumentError, match="no run of layerskip batch"):
        PartialResults(output, GREEDY, {})
    assert partial_file.read_text() == "my notes\n"


def test_a_finished_output_is_not_overwritten(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out.jsonl"
    PartialResults(output, GREEDY, {}).finish()
    with pytest.raises(InvalidArgumentError, match="exists already"):
        PartialResults(output, GREEDY, {})
    output.unlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgumentError, match="can't be written"):
        PartialResults(tmp_path / "file" / "out.jsonl", GREEDY, {})


def test_a_drawn_seed_is_kept(tmp_path: Path) -> None:
    config = GenerationConfig(temperature=0.5)
    seeds = {PartialResults(tmp_path / "a.jsonl", config, {}).seed for _ in range(3)}
    assert len(seeds) == 1
    assert PartialResults(tmp_path / "b.jsonl", config, {}).seed not in seeds
    assert PartialResults(tmp_path / "c.jsonl", GREEDY, {}).seed == 0
