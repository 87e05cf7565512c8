"""Our engine in lm-evaluation-harness, against the harness's own model for transformers."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import layerskip
from layerskip.decoding.config import GenerationConfig
from layerskip.errors import InvalidArgumentError, PromptError, TokenizerError
from layerskip.evaluation.eval import model as harness_model
from layerskip.evaluation.eval.model import make_model
from layerskip.evaluation.eval.options import TaskOptions
from layerskip.evaluation.eval.run import EvalReport, evaluate, find_tasks
from layerskip.evaluation.eval.shards import EvalWork, answer_elsewhere, number_of_shards
from layerskip.evaluation.run_folder import RunFolder, read_results
from layerskip.evaluation.samples import SampleStore

pytest.importorskip("lm_eval")

TASKS = ["tiny_choice", "tiny_write", "tiny_rolling"]
DOCUMENTS = [
    {"question": "def add(a, b):\n    return", "choices": [" a + b", " a - b", " None"], "gold": 0},
    {"question": "import os\nos.", "choices": ["path", "x", "getcwd()"], "gold": 2},
    {"question": "for i in ", "choices": ["range(3):", "x", "y:"], "gold": 0},
    {"question": "class A:\n    def __init__(self", "choices": [")", "):", ", path"], "gold": 1},
]
TEXTS = [
    "x = 3\n",
    "import os\n\n\ndef read(path):\n    with open(path) as file:\n        return file.read()\n" * 4,
    "é",
]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
SETTINGS = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "tiny_write": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n\n", ")"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "tiny_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multiple-choice task, one of texts, and one of perplexity, on the same documents."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "fewshot_split": "test",
        "target_delimiter": "",
    }
    for name, settings in SETTINGS.items():  # JSON is YAML
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **settings}))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Any) -> Path:
    """A random network with a context of 128 and a tokenizer that puts <s> in front."""
    folder: Path = tiny_checkpoint(tokenizer=True, seed=5)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    pieces = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def demo() -> layerskip.LanguageModel:
    return layerskip.load("demo", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def tiny(checkpoint: Path) -> layerskip.LanguageModel:
    return layerskip.load(str(checkpoint), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def make_hf() -> Callable[[Path], Any]:
    """The harness's own model."""
    from lm_eval.models.huggingface import HFLM

    def make(folder: Path) -> Any:
        return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)

    return make


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


PAIRS = [
    ("", "def"),
    ("", "<s>def add"),
    ("def add(a, b):\n    return", " a + b"),
    ("def add(a, b):\n    return", " a"),
    ("def add(a, b):\n    return", " b"),
    ("def add(a, b):\n    return ", "a"),  # the space moves to the continuation
    ("<s>def add(a", ", b)"),
    ("x = 1\n" * 100, "y = 2\nz = 3"),  # cut from the left
    ("import os\n" * 40, "\n" + "import sys\n" * 15),
    ("import", " os\n"),
]


@pytest.mark.parametrize("name", ["demo", "tiny"])
def test_log_likelihoods_are_those_of_the_harness(
    name: str, request: pytest.FixtureRequest, make_hf: Callable[[Path], Any]
) -> None:
    lm: layerskip.LanguageModel = request.getfixturevalue(name)
    ours, theirs = make_model(lm, lm.decoder.num_layers), make_hf(lm.checkpoint.hugging_face_folder)
    # What greedy decoding writes is likeliest, and only that.
    greedy = lm.generate([lm.tokenizer("import")["input_ids"]], max_new_tokens=3, generation_strategy="autoregressive")
    pairs = [*PAIRS, ("import", greedy[0].text), ("import", greedy[0].text + "zq")]
    requests = instances("loglikelihood", pairs)
    found, expected = ours.loglikelihood(requests), theirs.loglikelihood(requests)
    assert [pair[0] for pair in found] == pytest.approx([pair[0] for pair in expected], abs=1e-4)
    assert [pair[1] for pair in found] == [pair[1] for pair in expected]
    assert [pair[1] for pair in found[-2:]] == [True, False]
    rolling = instances("loglikelihood_rolling", [(text,) for text in TEXTS])
    found, expected = ours.loglikelihood_rolling(rolling), theirs.loglikelihood_rolling(rolling)
    assert found == pytest.approx(expected, abs=1e-4, rel=1e-6)


def test_exits_that_share_a_pass_score_as_they_do_alone(tiny: layerskip.LanguageModel) -> None:
    store, exits = SampleStore(), (1, 2, 4)
    pairs, texts = instances("loglikelihood", PAIRS), instances("loglikelihood_rolling", [(text,) for text in TEXTS])
    for exit_layer in (2, 4, 1):
        shared = make_model(tiny, exit_layer, store=store, scored_exits=exits)
        before = tiny.decoder.layer_calls
        found = shared.loglikelihood(pairs), shared.loglikelihood_rolling(texts)
        assert (tiny.decoder.layer_calls > before) == (exit_layer == 2)  # the first model does the work of all
        alone = make_model(tiny, exit_layer)
        assert found == (alone.loglikelihood(pairs), alone.loglikelihood_rolling(texts))
    assert len(store.samples) == len(exits) * (len(PAIRS) + len(TEXTS))


@pytest.mark.parametrize("name", ["demo", "tiny"])
def test_texts_are_those_of_the_harness_with_every_strategy(
    name: str, request: pytest.FixtureRequest, make_hf: Callable[[Path], Any]
) -> None:
    lm: layerskip.LanguageModel = request.getfixturevalue(name)
    contexts = ["def add(a, b):\n    return", "import os\n" * 60, "class A:\n", "for i in"]
    options = [{"until": ["\n\n", "("], "max_gen_toks": 30, "do_sample": False}, {"max_gen_toks": 12}]
    requests = instances("generate_until", [(c, o) for o in options for c in contexts])
    expected = make_hf(lm.checkpoint.hugging_face_folder).generate_until(requests)
    assert len(set(expected)) > 3
    for strategy in ("autoregressive", "self_speculative", "adaptive", "ngram"):
        config = GenerationConfig(generation_strategy=strategy)
        ours = make_model(lm, lm.decoder.num_layers, config=config, batch_size=3)
        assert ours.generate_until(requests) == expected, strategy


def evaluate_tiny(lm: layerskip.LanguageModel, folder: Path, **options: Any) -> EvalReport:
    return evaluate(lm, TASKS, include_path=folder, **options)


@pytest.mark.parametrize(("chat", "shots"), [(False, None), (False, 2), (True, 1)])
def test_metrics_are_those_of_the_harness(
    tiny: layerskip.LanguageModel,
    checkpoint: Path,
    task_folder: Path,
    make_hf: Callable[[Path], Any],
    chat: bool,
    shots: int | None,
) -> None:
    from lm_eval import simple_evaluate

    report = evaluate_tiny(tiny, task_folder, num_fewshot=shots, apply_chat_template=chat, batch_size=2)
    expected = simple_evaluate(
        model=make_hf(checkpoint),
        tasks=TASKS,
        task_manager=find_tasks(TASKS, task_folder).manager,
        num_fewshot=shots,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )["results"]
    (scores,) = report.exits
    assert set(scores.tasks) == set(TASKS)
    assert {"acc,none", "acc_norm,none", "acc_stderr,none"} <= scores.tasks["tiny_choice"].keys()
    for task, metrics in scores.tasks.items():
        assert metrics == pytest.approx({name: expected[task][name] for name in metrics}, rel=1e-4, abs=1e-4)
    assert (report.scores, report.writes) == (True, True)


def test_an_early_exit_scores_and_writes_by_its_own_layers(demo: layerskip.LanguageModel, task_folder: Path) -> None:
    report = evaluate_tiny(demo, task_folder, exit_layers=[2, 16], config=GenerationConfig(num_speculations=3))
    early, whole = report.exits
    assert [early.exit_layer, whole.exit_layer] == [2, 16]
    assert early.tasks["tiny_rolling"] != whole.tasks["tiny_rolling"]
    assert "acceptance_rate" not in early.speed
    assert 0 < whole.speed["acceptance_rate"] <= 1
    assert whole.speed["tokens_per_second"] > 0
    assert whole.speed["tokens_scored_per_second"] > 0
    # The second exit's tasks are as new ones.
    assert evaluate_tiny(demo, task_folder).exits[0].tasks == whole.tasks
    ours = make_model(demo, 2)
    context, continuation = DOCUMENTS[0]["question"], " a + b"
    (score,) = demo.score([context], [continuation], exit_layer=2)
    ((logprob, _),) = ours.loglikelihood(instances("loglikelihood", [(context, continuation)]))
    assert logprob == pytest.approx(score.logprob, abs=1e-4)
    (text,) = ours.generate_until(instances("generate_until", [(context, {"max_gen_toks": 9})]))
    alone = demo.generate([context], max_new_tokens=9, generation_strategy="early_exit", exit_layer=2)
    assert text == alone[0].text


class Interrupted(Exception):
    pass


@pytest.mark.slow
def test_finished_requests_are_not_run_again(
    demo: layerskip.LanguageModel, task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored, written = [], []
    score, write = harness_model.score_continuations, layerskip.LanguageModel.generate

    def counting_score(decoder: Any, context: Any, continuations: Any, exit_layers: Any) -> Any:
        scored.extend((tuple(context), tuple(c), tuple(exit_layers)) for c in continuations)
        return score(decoder, context, continuations, exit_layers)

    def counting_write(lm: Any, prompts: Any, config: Any = None, **options: Any) -> Any:
        written.extend(map(tuple, prompts))
        return write(lm, prompts, config, **options)

    monkeypatch.setattr(harness_model, "score_continuations", counting_score)
    monkeypatch.setattr(layerskip.LanguageModel, "generate", counting_write)

    def run(folder: Path, stop_at: int | None = None) -> EvalReport:
        told = 0

        def progress(what: str, done: int, total: int | None) -> None:
            nonlocal told
            told += 1
            if told == stop_at:
                raise Interrupted

        output = RunFolder(folder, "eval", {"tasks": TASKS})
        return evaluate_tiny(demo, task_folder, exit_layers=[4, 16], batch_size=3, output=output, on_progress=progress)

    expected = run(tmp_path / "whole")
    assert len(set(scored)) == len(scored)  # one pass for both exits
    whole = sorted(scored), sorted(written)
    scored.clear()
    written.clear()
    for stop_at in (8, 12, 9):  # among scores, and in the middle of a batch of texts
        with pytest.raises(Interrupted):
            run(tmp_path / "parts", stop_at)
    report = run(tmp_path / "parts")
    # A context whose continuations were scored but not all kept is the only thing that may be scored again.
    assert len(scored) <= len(whole[0]) + 3 * 2
    assert set(scored) == set(whole[0])
    assert len(written) <= len(whole[1]) + 3 * 2
    assert set(written) == set(whole[1])
    assert [e.tasks for e in report.exits] == [e.tasks for e in expected.exits]
    scored.clear()
    written.clear()
    assert [e.speed for e in run(tmp_path / "parts").exits] == [e.speed for e in report.exits]
    assert scored == written == []


def test_the_folder_has_our_results_and_the_harnesss(
    demo: layerskip.LanguageModel, task_folder: Path, tmp_path: Path
) -> None:
    output = RunFolder(tmp_path, "eval", {})
    for _ in range(2):  # the second run's files take the place of the first one's
        report = evaluate_tiny(demo, task_folder, exit_layers=[3, 16], limit=2, output=output)
    content, samples = read_results(tmp_path)
    assert content["kind"] == "eval"
    assert content["results"] == json.loads(json.dumps(report.results()))
    assert {sample["kind"] for sample in samples} == {"loglikelihood", "loglikelihood_rolling", "generate_until"}
    for exit_ in report.exits:
        (file,) = (tmp_path / f"exit_{exit_.exit_layer}").glob("*/results_*.json")
        theirs = json.loads(file.read_text())
        assert theirs["results"]["tiny_choice"]["acc,none"] == exit_.tasks["tiny_choice"]["acc,none"]
        assert theirs["config"]["model_exit_layer"] == exit_.exit_layer
        (lines,) = file.parent.glob("samples_tiny_choice_*.jsonl")
        assert len(lines.read_text().splitlines()) == 2


def test_sampled_texts_differ_between_repetitions_and_not_between_strategies(demo: layerskip.LanguageModel) -> None:
    options = {"until": ["\n\n"], "max_gen_toks": 20, "do_sample": True, "temperature": 1.0, "top_p": 0.95}
    requests = instances("generate_until", [("def f(x):\n", options)] * 3)
    config = GenerationConfig(generation_strategy="autoregressive", seed=4)
    texts = make_model(demo, 16, config=config).generate_until(requests)
    assert len(set(texts)) == 3
    config = GenerationConfig(generation_strategy="self_speculative", exit_layer=4, seed=4)
    assert make_model(demo, 16, config=config, batch_size=3).generate_until(requests) == texts
    config = GenerationConfig(seed=5)
    assert make_model(demo, 16, config=config).generate_until(requests[:1]) != texts[:1]


def test_options_of_tasks(demo: layerskip.LanguageModel) -> None:
    options = TaskOptions(demo, GenerationConfig(generation_strategy="ngram", num_speculations=2, seed=1))
    config, until = options.read({"until": "<pad>\n", "temperature": 0.5, "top_k": 7, "max_new_tokens": 5})
    assert until == ["<pad>\n", "</s>"]
    assert config == GenerationConfig(
        generation_strategy="ngram",
        num_speculations=2,
        seed=1,
        stop=("<pad>", "</s>"),  # tokens, which would leave no text
        do_sample=True,
        temperature=0.5,
        top_k=7,
        max_new_tokens=5,
    )
    greedy, _ = options.read({"do_sample": False, "temperature": 0.7, "top_p": 0.5, "num_beams": 1})
    assert not greedy.samples
    assert (greedy.max_new_tokens, greedy.top_p) == (256, 1.0)
    with pytest.raises(InvalidArgumentError, match="num_beams: 4"):
        options.read({"num_beams": 4})


def test_a_models_own_penalty_counts_as_in_the_harness(
    checkpoint: Path, tmp_path: Path, make_hf: Callable[[Path], Any]
) -> None:
    folder = tmp_path / "penalty"
    shutil.copytree(checkpoint, folder)
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.8, "top_k": 3}))
    lm = layerskip.load(str(folder), dtype="float32", device="cpu")
    requests = instances("generate_until", [("def f(x):\n", {"max_gen_toks": 40}), ("x", {"max_gen_toks": 40})])
    assert make_model(lm, lm.decoder.num_layers).generate_until(requests) == make_hf(folder).generate_until(requests)
    plain = make_model(layerskip.load(str(checkpoint), dtype="float32", device="cpu"), lm.decoder.num_layers)
    assert make_model(lm, lm.decoder.num_layers).generate_until(requests) != plain.generate_until(requests)


def test_chat_template_without_a_system_message(tiny: layerskip.LanguageModel) -> None:
    model = make_model(tiny, 4)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert model.apply_chat_template(messages) == "user: Hello\nassistant: "
    assert model.chat_template(True) == TEMPLATE
    assert model.tokenizer_name


def test_a_token_that_spans_context_and_continuation(demo: layerskip.LanguageModel) -> None:
    """The harness's rule leaves the continuation without tokens; the other requests get their numbers all the same."""
    pairs = [("def f(x):\n    retu", "rn"), ("def f(x):\n    return", " x"), ("a", "")]
    model = make_model(demo, demo.decoder.num_layers)
    context, continuation = model._encode_pair(*pairs[0])
    assert (len(context) > 0, continuation) == (True, [])
    spanning, ordinary, empty = model.loglikelihood(instances("loglikelihood", pairs))
    assert spanning == empty == (0.0, True)
    assert [ordinary] == make_model(demo, demo.decoder.num_layers).loglikelihood(instances("loglikelihood", pairs[1:2]))
    assert model.answers.speed()["scores_without_tokens"] == 2


def test_bad_requests(tiny: layerskip.LanguageModel) -> None:
    model = make_model(tiny, 4)
    with pytest.raises(PromptError, match="more than the context of 128"):
        model.loglikelihood(instances("loglikelihood", [("a", " x = 1\n" * 100)]))
    with pytest.raises(InvalidArgumentError, match="up to 256 tokens, and the context of 128"):
        model.generate_until(instances("generate_until", [("a", {"until": ["\n"]})]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exit_layers": [17]}, "exit_layer 17 is outside 1..16"),
        ({"exit_layers": []}, "no exit layers"),
        ({"limit": 0}, "limit must be a whole number of at least 1, got 0"),
        ({"num_fewshot": -1}, "num_fewshot must be a whole number of at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"include_path": Path("nowhere")}, "nowhere is no folder"),
        ({"config": GenerationConfig(generation_strategy="early_exit", exit_layer=3)}, "name the exits"),
    ],
)
def test_bad_arguments(demo: layerskip.LanguageModel, task_folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        evaluate(demo, TASKS, **{"include_path": task_folder, **options})


def test_a_missing_chat_template_is_told(demo: layerskip.LanguageModel, task_folder: Path) -> None:
    with pytest.raises(TokenizerError, match="no chat template"):
        evaluate_tiny(demo, task_folder, apply_chat_template=True)


def test_a_task_that_cannot_be_loaded_is_told(demo: layerskip.LanguageModel, tmp_path: Path) -> None:
    settings = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "missing.jsonl")}}}
    task = {"task": "broken", "test_split": "test", **settings, **SETTINGS["tiny_choice"]}
    (tmp_path / "broken.yaml").write_text(json.dumps(task))
    with pytest.raises(InvalidArgumentError, match=r"task 'broken' can't be loaded: .*missing\.jsonl"):
        evaluate(demo, ["broken"], include_path=tmp_path)


def test_a_missing_harness_is_told(demo: layerskip.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.models.utils", None)
    monkeypatch.delattr("lm_eval.models.utils", raising=False)
    with pytest.raises(InvalidArgumentError, match=r"pip install 'layerskip\[eval\]'"):
        evaluate(demo, ["arc_easy"])


def test_requests_that_are_shared_out(demo: layerskip.LanguageModel, task_folder: Path, tmp_path: Path) -> None:
    """Every request is answered once, by one of the shards, and the scores are those of an evaluation in one piece."""
    run = RunFolder(tmp_path / "shared", "eval", {})
    work = EvalWork(
        load=lambda: demo,
        tasks=tuple(TASKS),
        include_path=task_folder,
        options={"batch_size": 2, "exit_layers": [4, 16]},
    )
    added: list[int] = []

    def mapper(shards: Any, make_worker: Any) -> Any:
        worker = make_worker()
        for shard in shards:
            answers = list(worker(shard))
            added.append(len(answers))
            yield from answers

    answer_elsewhere(work, run, mapper, number_of_shards(1))
    assert len(added) == 4
    assert all(0 < number < len(run.samples) / 2 for number in added)
    assert sum(added) == len(run.samples)
    answered = dict(run.samples)
    shared = evaluate(demo, TASKS, include_path=task_folder, exit_layers=[4, 16], output=run)
    assert run.samples == answered  # nothing was left to do
    whole = evaluate(demo, TASKS, include_path=task_folder, exit_layers=[4, 16])
    assert [scores.tasks for scores in shared.exits] == [scores.tasks for scores in whole.exits]
    answer_elsewhere(work, run, mapper, number_of_shards(1))
    assert added[4:] == [0] * 4
