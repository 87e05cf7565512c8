"""lm-evaluation-harness's own clients: what they get from the server is what `layerskip eval` computes."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import Served, serving

import layerskip
from layerskip.checkpoint.checkpoint import DEMO_FOLDER
from layerskip.evaluation.eval.model import make_model

pytest.importorskip("lm_eval")
pytest.importorskip("tenacity")

DOCUMENTS = [
    {"question": "def add(a, b):\n    return", "choices": [" a + b", " a - b", " None"], "gold": 0},
    {"question": "import os\nos.", "choices": ["path", "x", "getcwd()"], "gold": 2},
    {"question": "for i in ", "choices": ["range(3):", "x", "y:"], "gold": 0},
    {"question": "class A:\n    def __init__(self", "choices": [")", "):", ", path"], "gold": 1},
    {"question": "# é\nx = '", "choices": ["é'", "日本'", "a'"], "gold": 0},
]
SETTINGS = {
    "served_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "served_write": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n\n", ")"], "max_gen_toks": 24},
        "metric_list": [{"metric": "exact_match"}],
    },
    "served_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with a chat template."""
    folder = tmp_path_factory.mktemp("talker") / "talker"
    shutil.copytree(DEMO_FOLDER, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def model(talker: Path) -> layerskip.LanguageModel:
    return layerskip.load(str(talker), device="cpu")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, model: layerskip.LanguageModel) -> Path:
    """The tasks' folder; one choice is what the model itself writes."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "documents.jsonl"
    question = "import os\nimport sys\n"
    (likeliest,) = model.generate(question, max_new_tokens=4)
    documents = [*DOCUMENTS, {"question": question, "choices": [likeliest.text, "zq"], "gold": 0}]
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "target_delimiter": "",
    }
    for name, settings in SETTINGS.items():  # JSON is YAML
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **settings}))
    return folder


@pytest.fixture(scope="module")
def server(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("server"), str(talker), "--served-name", "talker") as started:
        yield started


def evaluate(model: Any, folder: Path, names: list[str], **options: Any) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = simple_evaluate(model=model, tasks=names, task_manager=manager, bootstrap_iters=0, **options)
    return dict(results)


def answers(results: dict[str, Any], task: str) -> list[Any]:
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [answer[0] for sample in samples for answer in sample["resps"]]


def scores(results: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {
        (task, metric): value
        for task, values in results["results"].items()
        for metric, value in values.items()
        if isinstance(value, float)
    }


@pytest.mark.parametrize("clients", [1, 4])
def test_completions(
    server: Served, model: layerskip.LanguageModel, talker: Path, tasks: Path, clients: int, monkeypatch: Any
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    names = list(SETTINGS)
    ours = evaluate(make_model(model, model.decoder.num_layers), tasks, names)
    options = {
        "model": "talker",
        "base_url": f"{server.address}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(talker),
        "add_bos_token": True,  # as this tokenizer does by itself
        "num_concurrent": clients,
        "max_retries": 1,
        "max_length": server.facts["max_model_len"],
    }
    theirs = evaluate("local-completions", tasks, names, model_args=options)
    assert answers(theirs, "served_write") == answers(ours, "served_write")
    expected, got = answers(ours, "served_choice"), answers(theirs, "served_choice")
    assert len(got) == 2 + sum(len(document["choices"]) for document in DOCUMENTS)
    assert [float(value) for value, _ in got] == pytest.approx([float(value) for value, _ in expected], abs=1e-4)
    assert [str(greedy) for _, greedy in got] == [str(greedy) for _, greedy in expected]
    assert {str(greedy) for _, greedy in got} == {"True", "False"}
    assert scores(theirs) == pytest.approx(scores(ours), rel=1e-5)


def test_chat_completions(
    server: Served, model: layerskip.LanguageModel, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    chat = {"apply_chat_template": True, "fewshot_as_multiturn": True}
    ours = evaluate(make_model(model, model.decoder.num_layers), tasks, ["served_write"], **chat)
    options = {"model": "talker", "base_url": f"{server.address}/v1/chat/completions", "max_retries": 1}
    theirs = evaluate("local-chat-completions", tasks, ["served_write"], model_args=options, **chat)
    assert answers(theirs, "served_write") == answers(ours, "served_write")
    assert any(answers(ours, "served_write"))
    assert scores(theirs) == scores(ours)
