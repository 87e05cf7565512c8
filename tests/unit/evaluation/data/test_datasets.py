"""Data sets from files and from what `datasets` loads, and clear errors for what can't be used."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from layerskip.decoding.config import GenerationConfig
from layerskip.errors import InvalidArgumentError, PromptError, TokenizerError
from layerskip.evaluation.data.datasets import DATASETS, Example, encode_examples, load_examples
from layerskip.evaluation.data.templates import BEGINNING_WORDS
from layerskip.language_model import LanguageModel, load

SRC = Path(__file__).parents[4] / "src"
ARTICLE = "  ".join(f"word{i}" for i in range(BEGINNING_WORDS + 20))
RECORDS: dict[str, dict[str, Any]] = {
    "cnn_dm_summarization": {"article": "A fox ran.", "highlights": "Fox runs.", "id": "1"},
    "cnn_dm_lm": {"article": ARTICLE, "highlights": "Words.", "id": "1"},
    "xsum_summarization": {"document": "A fox ran.", "summary": "Fox runs.", "id": "1"},
    "human_eval": {
        "task_id": "HumanEval/0",
        "prompt": "def one():\n",
        "canonical_solution": "    return 1\n",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
        "entry_point": "one",
    },
    "top_v2": {"domain": "alarm", "utterance": "wake me at 7", "semantic_parse": "[IN:CREATE_ALARM at 7 ]"},
    "gsm8k": {"question": "What is 3 + 4?", "answer": "3 + 4 = 7\n#### 7"},
    "spec_bench": {"question_id": 81, "category": "writing", "turns": ["Write a line.", "And another."]},
    "custom_jsonl": {"prompt": "Say {hello}", "reference": "hello"},
    "chat_format": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi"},
        ]
    },
}
EXPECTED: dict[str, tuple[Any, str | None]] = {
    "cnn_dm_summarization": ("Article: A fox ran.\nSummary:", "Fox runs."),
    "cnn_dm_lm": (
        "  ".join(f"word{i}" for i in range(BEGINNING_WORDS)),
        "  " + "  ".join(f"word{i}" for i in range(BEGINNING_WORDS, BEGINNING_WORDS + 20)),
    ),
    "xsum_summarization": ("Article: A fox ran.\nSummary:", "Fox runs."),
    "human_eval": ("def one():\n", "    return 1\n"),
    "top_v2": ("Utterance: wake me at 7\nSemantic parse:", "[IN:CREATE_ALARM at 7 ]"),
    "gsm8k": ("Question: What is 3 + 4?\nAnswer:", "3 + 4 = 7\n#### 7"),
    "spec_bench": ("Write a line.", None),
    "custom_jsonl": ("Say {hello}", "hello"),
    "chat_format": ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}], "Hi"),
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes records, or a text, to a file."""

    def make(content: Any, name: str = "data.jsonl") -> Path:
        file = tmp_path / name
        if not isinstance(content, str):
            content = "".join(json.dumps(record) + "\n" for record in content)
        file.write_text(content, encoding="utf-8")
        return file

    return make


def sums(number: int) -> list[dict[str, str]]:
    return [{"question": f"What is {i} + 1?", "answer": f"{i + 1}\n#### {i + 1}"} for i in range(number)]


def test_every_data_set_has_a_case_here() -> None:
    assert set(RECORDS) == set(EXPECTED) == set(DATASETS)


@pytest.mark.parametrize("name", RECORDS)
def test_prompts_and_references(name: str, write: Callable[..., Path]) -> None:
    prompt, reference = EXPECTED[name]
    (example,) = load_examples(name, data_path=write([RECORDS[name]]))
    assert example == Example(index=0, prompt=prompt, reference=reference, metadata=RECORDS[name])


def test_lists_in_json_files_marks_and_empty_lines(write: Callable[..., Path]) -> None:
    listed = load_examples("gsm8k", data_path=write(json.dumps(sums(3), indent=1), "list.json"))
    text = "\ufeff" + "\n\n".join(json.dumps(record, ensure_ascii=False) for record in sums(3)) + "\r\n"
    assert load_examples("gsm8k", data_path=write(text)) == listed
    assert [example.index for example in listed] == [0, 1, 2]
    separated = '{"prompt": "a\u2028b\u0085c"}\n'  # line ends for Python, and not for JSON lines
    assert load_examples("custom_jsonl", data_path=write(separated))[0].prompt == "a\u2028b\u0085c"


def test_the_first_ones_or_a_draw(write: Callable[..., Path]) -> None:
    file = write(sums(30))
    first = load_examples("gsm8k", data_path=file, num_samples=5)
    assert [example.index for example in first] == [0, 1, 2, 3, 4]
    drawn = load_examples("gsm8k", data_path=file, num_samples=5, shuffle_seed=1)
    assert drawn == load_examples("gsm8k", data_path=file, num_samples=5, shuffle_seed=1)
    assert drawn != load_examples("gsm8k", data_path=file, num_samples=5, shuffle_seed=2)
    assert len({example.index for example in drawn}) == 5
    for example in drawn:
        assert example.prompt == f"Question: What is {example.index} + 1?\nAnswer:"
    assert len(load_examples("gsm8k", data_path=file, num_samples=99, shuffle_seed=1)) == 30


def test_few_shot_prompts_begin_with_the_first_records_which_are_not_asked(write: Callable[..., Path]) -> None:
    records = sums(8)
    file = write([*records, records[1]])  # one that is shown comes again
    examples = load_examples("gsm8k", data_path=file, n_shot=2, shuffle_seed=3)
    shots = "Question: What is 0 + 1?\nAnswer: 1\n#### 1\n\nQuestion: What is 1 + 1?\nAnswer: 2\n#### 2\n\n"
    assert sorted(example.index for example in examples) == [2, 3, 4, 5, 6, 7]
    for example in examples:
        assert example.prompt == f"{shots}Question: What is {example.index} + 1?\nAnswer:"
        assert example.reference == f"{example.index + 1}\n#### {example.index + 1}"
    code = [RECORDS["human_eval"], {**RECORDS["human_eval"], "prompt": "def two():\n"}]
    (example,) = load_examples("human_eval", data_path=write(code), n_shot=1)
    assert example.prompt == "def one():\n    return 1\n\ndef two():\n"


def test_a_template_of_ones_own(write: Callable[..., Path]) -> None:
    file = write([{**RECORDS["top_v2"], "level": 3}])
    (example,) = load_examples("top_v2", data_path=file, template="{{{domain}}} {level}: {utterance}\n=> ")
    assert example.prompt == "{alarm} 3: wake me at 7\n=> "
    other = write([{"text": "a", "response": "b"}, {"text": "c", "reference": None}])
    examples = load_examples("custom_jsonl", data_path=other, template="<{text}>")
    assert [(example.prompt, example.reference) for example in examples] == [("<a>", "b"), ("<c>", None)]


def test_short_articles_have_no_rest(write: Callable[..., Path]) -> None:
    article = " ".join(["word"] * BEGINNING_WORDS)
    (example,) = load_examples("cnn_dm_lm", data_path=write([{"article": article}]))
    assert (example.prompt, example.reference) == (article, None)


def test_references_of_spec_bench_and_chats_without_answers(write: Callable[..., Path]) -> None:
    record = {**RECORDS["spec_bench"], "reference": ["A line.", "Another line."]}
    assert load_examples("spec_bench", data_path=write([record]))[0].reference == "A line."
    assert load_examples("spec_bench", data_path=write([{**record, "reference": []}]))[0].reference is None
    chat = [{"role": "user", "content": "Hello"}]
    (example,) = load_examples("chat_format", data_path=write([{"messages": chat}]))
    assert (example.prompt, example.reference) == (chat, None)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("Q: {questoin}", r"line 1 has no column 'questoin', which the template .* names; it has 'question', 'answer'"),
        ("no columns", "names no column"),
        ("{question", "can't be read"),
        ("{}", "must name columns"),
        ("{question.upper}", r"must name columns .*\{question.upper\}"),
        ("{question:>10}", "must name columns"),
        ("{question!r}", r"\{question!r\}"),
    ],
)
def test_bad_templates(template: str, message: str, write: Callable[..., Path]) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        load_examples("gsm8k", data_path=write(sums(2)), template=template)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gsm8k", '{"question": "a", "answer": "b"}\n\n{"question": 1,}\n', r"data.jsonl, line 3 is not JSON: .*"),
        ("gsm8k", '{"question": "a", "response": "b"}\n', "line 1 has no column 'answer'; it has 'question', 'resp"),
        ("gsm8k", '\n{"question": null, "answer": "b"}\n', "line 2 has no column 'question'; it has 'answer'"),
        ("gsm8k", '{"question": "a", "answer": 3}\n', "line 1: column 'answer' must be a text, got 3"),
        ("gsm8k", '{"question": ["a"], "answer": "3"}\n', "line 1: column 'question' must be a text, got"),
        ("gsm8k", "[1]\n", "line 1 must be a JSON object with columns, got a list"),
        ("gsm8k", '{"question": "\\ud800", "answer": "b"}\n', "line 1 spells half a character"),
        ("gsm8k", " \n", "is empty"),
        ("custom_jsonl", '{"text": "a"}\n', "no column 'prompt', .* it has 'text'"),
        ("custom_jsonl", '{"prompt": " "}\n', "line 1 has an empty prompt"),
        ("spec_bench", '{"turns": "a"}\n', "'turns' must be a list of texts"),
        ("spec_bench", '{"turns": []}\n', "'turns' must be a list of texts"),
        ("chat_format", '{"messages": []}\n', "'messages' must be a list of messages"),
        ("chat_format", '{"messages": [{"role": "user"}]}\n', "must have messages such as"),
        ("chat_format", '{"messages": ["Hello"]}\n', "must have messages such as"),
        ("chat_format", '{"messages": [{"role": "assistant", "content": "a"}]}\n', "nothing but an answer"),
        ("cnn_dm_lm", '{"article": 1}\n', "column 'article' must be a text"),
    ],
)
def test_bad_records(name: str, content: str, message: str, write: Callable[..., Path]) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        load_examples(name, data_path=write(content))


def test_bad_files(tmp_path: Path, write: Callable[..., Path]) -> None:
    for file, message in (
        (write("[]", "a.json"), "has no records"),
        (write('{"a": 1}', "b.json"), "must hold a list of records, got a dict"),
        (write('[\n{"a": 1},\n{"a" 2}]', "c.json"), "line 3 is not JSON"),
        (write("a,b\n", "d.csv"), "must be a .jsonl or .json file"),
        (tmp_path / "none.jsonl", "can't be read"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            load_examples("gsm8k", data_path=file)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("squad", {}, "'squad' is not known; it can be cnn_dm_summarization, cnn_dm_lm, xsum_summarization, human_ev"),
        ("gsm8k", {"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ("gsm8k", {"n_shot": -1}, "n_shot must be 0 or more, got -1"),
        ("gsm8k", {"n_shot": 4}, "n_shot must be at most 3, the records of .*: 4"),
        ("gsm8k", {"n_shot": 3}, "n_shot must leave records to ask: .* has 3, got n_shot 3"),
        ("gsm8k", {"split": "train"}, "split 'train' belongs to the hub"),
        ("gsm8k", {"repository": "a/b"}, "repository 'a/b' belongs to the hub"),
        ("chat_format", {"n_shot": 1}, "takes the messages as they are, got n_shot 1"),
        ("chat_format", {"template": "{a}"}, "takes the messages as they are, got template"),
    ],
)
def test_bad_arguments(name: str, options: dict[str, Any], message: str, write: Callable[..., Path]) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        load_examples(name, data_path=write(sums(3)), **options)


def test_examples_to_show_need_references(write: Callable[..., Path]) -> None:
    file = write([{"prompt": "a"}, {"prompt": "b", "reference": "c"}])
    with pytest.raises(InvalidArgumentError, match=r"line 1 has no reference \(reference, response\), which n_shot 1"):
        load_examples("custom_jsonl", data_path=file, n_shot=1)


@pytest.mark.parametrize("name", ["custom_jsonl", "chat_format", "spec_bench"])
def test_data_sets_that_are_files(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{name} needs data_path"):
        load_examples(name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a repository that `datasets` loads from disk as it would from the hub; its cache isn't the user's."""
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def make(splits: dict[str, list[dict[str, Any]]], configuration: str = "default", form: str = "json") -> Path:
        from datasets import Dataset

        folder = tmp_path / "repository"
        folder.mkdir()
        for split, records in splits.items():
            dataset = Dataset.from_list(records)
            if form == "parquet":
                dataset.to_parquet(folder / f"{split}.parquet")
            else:
                dataset.to_json(folder / f"{split}.json")
        files = "".join(f"  - split: {split}\n    path: {split}.{form}\n" for split in splits)
        head = f"---\nconfigs:\n- config_name: {configuration}\n  data_files:\n{files}---\n"
        (folder / "README.md").write_text(head)
        return folder

    return make


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_the_hub_with_shots_of_the_train_split(
    form: str, hub: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = [{"question": f"What is {i}?", "answer": f"#### {i}"} for i in (70, 71, 72)]
    folder = hub({"train": train, "test": [train[1], *sums(4)]}, "main", form)
    monkeypatch.setitem(DATASETS, "gsm8k", replace(DATASETS["gsm8k"], repository=str(folder)))
    examples = load_examples("gsm8k", n_shot=2, num_samples=3)
    assert [example.index for example in examples] == [1, 2, 3]  # the first one is shown
    shots = "Question: What is 70?\nAnswer: #### 70\n\nQuestion: What is 71?\nAnswer: #### 71\n\n"
    assert examples[0].prompt == f"{shots}Question: What is 0 + 1?\nAnswer:"
    assert examples[0].metadata == sums(1)[0]
    assert len(load_examples("gsm8k")) == 5
    assert [example.index for example in load_examples("gsm8k", split="train", n_shot=1)] == [1, 2]
    with pytest.raises(InvalidArgumentError, match="n_shot must be at most 3"):
        load_examples("gsm8k", n_shot=4)


@pytest.mark.parametrize("name", [name for name, spec in DATASETS.items() if spec.repository is not None])
def test_every_data_set_of_the_hub(name: str, hub: Callable[..., Path]) -> None:
    folder = hub({DATASETS[name].split: [RECORDS[name]]})
    (example,) = load_examples(name, repository=str(folder))
    assert (example.prompt, example.reference) == EXPECTED[name]
    assert example.metadata == RECORDS[name]


def test_a_repository_with_other_columns_or_splits_or_a_script(hub: Callable[..., Path]) -> None:
    folder = hub({"test": [{"instruction": "a", "answer": "b"}]})
    with pytest.raises(InvalidArgumentError, match="record 0 has no column 'question'; it has 'instruction', 'answer'"):
        load_examples("gsm8k", repository=str(folder))
    with pytest.raises(InvalidArgumentError, match=r"split validation\) can't be loaded: .*--data-path FILE"):
        load_examples("gsm8k", repository=str(folder), split="validation")
    (folder / "repository.py").write_text("")
    with pytest.raises(InvalidArgumentError, match=r"scripts are no longer supported.*--data-path FILE"):
        load_examples("gsm8k", repository=str(folder))


def test_an_unreachable_hub_says_how_to_give_a_file(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    code = """
from layerskip.errors import InvalidArgumentError
from layerskip.evaluation.data.datasets import load_examples
try:
    load_examples("xsum_summarization", num_samples=1)
except InvalidArgumentError as error:
    print(error)
"""
    environment = {
        **os.environ,
        "PYTHONPATH": str(SRC),
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    for words in (
        "data set xsum_summarization (EdinburghNLP/xsum, split test) can't be loaded",
        "connect to the Hugging Face hub",
        "a .jsonl file with document, summary: --data-path FILE",
    ):
        assert words in done.stdout


@pytest.fixture(scope="module")
def demo() -> LanguageModel:
    return load("demo", max_context=64)


def test_texts_are_encoded_as_generate_does(demo: LanguageModel) -> None:
    examples = [Example(index=4, prompt="def f(x):", reference=None), Example(index=2, prompt="a", reference=None)]
    config = GenerationConfig(max_new_tokens=4)
    assert encode_examples(demo, examples, config) == demo.encode(["def f(x):", "a"])
    with pytest.raises(PromptError, match=r"prompt 7 has \d+ tokens, and the context of 64"):
        encode_examples(demo, [Example(index=7, prompt="x = 1\n" * 100, reference=None)], config)


def test_messages_go_through_the_chat_template(demo: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [Example(index=3, prompt=[{"role": "user", "content": "Hello"}], reference=None)]
    config = GenerationConfig(max_new_tokens=4)
    template = (
        "{% for m in messages %}{% if not m.content %}{{ raise_exception('says nothing') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    with pytest.raises(TokenizerError, match="'demo' has no chat template"):
        encode_examples(demo, examples, config)
    monkeypatch.setattr(demo.tokenizer, "chat_template", template)
    assert encode_examples(demo, examples, config) == demo.encode(["[user]Hello[assistant]"], special_tokens=False)
    with pytest.raises(PromptError, match="can't be applied to example 3: says nothing"):
        encode_examples(demo, [replace(examples[0], prompt=[{"role": "user", "content": ""}])], config)


def test_the_package_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InvalidArgumentError, match=r"pip install 'layerskip\[bench\]'; or give a file: --data-path"):
        load_examples("gsm8k")
