"""Data sets by hub id, against a small hub on this machine."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from stub_hub import Hub, Repository, User, serve

pytest.importorskip("datasets")

LOAD = """
import json, sys
from layerskip.errors import LayerSkipError
from layerskip.evaluation.data.datasets import load_examples
results = []
for name, repository in json.loads(sys.argv[1]):
    try:
        found = load_examples(name, num_samples=2, n_shot=1, repository=repository)
        results.append({"prompts": [e.prompt for e in found], "references": [e.reference for e in found]})
    except LayerSkipError as error:
        results.append({"error": type(error).__name__, "message": str(error)})
print(json.dumps(results))
"""
CARD = b"""---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
---
"""
MAIN, CONVERTED = "a" * 40, "b" * 40


def records(word: str) -> bytes:
    return "".join(json.dumps({"question": f"{word} {i}?", "answer": f"so #### {i}"}) + "\n" for i in range(3)).encode()


@pytest.fixture
def hub() -> Iterator[Hub]:
    data = {"main/train-0.jsonl": records("train"), "main/test-0.jsonl": records("test")}
    known = Repository({MAIN: {"README.md": CARD, **data}}, {"main": MAIN})
    bare = Repository({MAIN: {"train.jsonl": records("train"), "test.jsonl": records("own")}}, {"main": MAIN})
    script = Repository(
        {MAIN: {"script.py": b"raise SystemExit", "README.md": b""}, CONVERTED: {"README.md": CARD, **data}},
        {"main": MAIN, "refs/convert/parquet": CONVERTED, "refs%2Fconvert%2Fparquet": CONVERTED},
    )
    with serve({"datasets/openai/gsm8k": known, "datasets/owner/bare": bare, "datasets/owner/script": script}) as found:
        yield found


def test_splits_and_configurations(hub: Hub, tmp_path: Path) -> None:
    user = User(tmp_path, hub.url)
    known, bare = user.run(LOAD, ("gsm8k", None), ("gsm8k", "owner/bare"))
    assert known["references"] == bare["references"] == ["so #### 0", "so #### 1"]
    for word, found in (("test", known), ("own", bare)):
        assert [f"{word} {i}?" in prompt for i, prompt in enumerate(found["prompts"])] == [True, True]
        assert all(prompt.startswith("Question: train 0?") for prompt in found["prompts"])  # the solved example
    asked = len(hub.requests)
    assert user.run(LOAD, ("gsm8k", None), HF_HUB_OFFLINE="1") == [known]
    assert len(hub.requests) == asked


def test_a_repository_with_a_script_is_read_as_the_hub_converted_it(hub: Hub, tmp_path: Path) -> None:
    (found,) = User(tmp_path, hub.url).run(LOAD, ("gsm8k", "owner/script"))
    assert found["references"] == ["so #### 0", "so #### 1"]


def test_what_cannot_be_loaded(hub: Hub, tmp_path: Path) -> None:
    user = User(tmp_path, hub.url)
    nothing, columns = user.run(LOAD, ("gsm8k", "owner/nothing"), ("xsum_summarization", "owner/bare"))
    assert nothing["error"] == columns["error"] == "InvalidArgumentError"
    assert "data set gsm8k (owner/nothing, split test) can't be loaded" in nothing["message"]
    assert "--data-path" in nothing["message"]
    assert "no column 'document'" in columns["message"]
    assert "'question'" in columns["message"]
    (offline,) = user.run(LOAD, ("human_eval", None), HF_HUB_OFFLINE="1")
    for words in ("openai/openai_humaneval", "connect to the Hugging Face hub", "--data-path FILE"):
        assert words in offline["message"]
