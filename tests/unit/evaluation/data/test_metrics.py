"""Metrics agree with the libraries that define them."""

import sys
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest

from layerskip.errors import InvalidArgumentError
from layerskip.evaluation.data.datasets import Example
from layerskip.evaluation.data.metrics import (
    ROUGE_TYPES,
    answer_match,
    bleu,
    combine_metrics,
    cut_prediction,
    exact_match,
    gsm8k_answer,
    metrics_for,
    normalize,
    rouge,
    sample_metrics,
)

sacrebleu = pytest.importorskip("sacrebleu")
rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")

PREDICTIONS = [
    "The Cat  was sitting on\nthe mats, and it looked at the dog.",
    "Prices rose by three percent in May",
    "",
    "The same words, in the same order.",
]
REFERENCES = [
    "the cat sat on the mat and looked at the dogs",
    "In May prices have risen by three per cent, a government office said",
    "nothing was predicted here",
    "The same words, in the same order.",
]


def test_normalisation() -> None:
    assert normalize("  The\tCAT\n\n sat ") == "the cat sat"
    assert normalize(normalize("ÄB  c")) == normalize("ÄB  c") == "äb c"


def test_rouge_is_the_mean_of_rouge_score() -> None:
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rouge3", "rougeL"], use_stemmer=True)
    each = [scorer.score(target, text) for target, text in zip(REFERENCES, PREDICTIONS, strict=True)]
    expected = {name: sum(scores[name].fmeasure for scores in each) / len(each) for name in ROUGE_TYPES}
    assert rouge(PREDICTIONS, REFERENCES) == pytest.approx(expected)
    assert 0.3 < expected["rouge2"] < expected["rouge1"] < 1  # the texts tell metrics apart


def test_bleu_is_that_of_sacrebleu() -> None:
    expected = sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES], lowercase=True).score
    assert bleu(PREDICTIONS, REFERENCES) == pytest.approx(expected)
    assert 5 < expected < 95
    assert bleu(REFERENCES, REFERENCES) == pytest.approx(100)


def test_exact_match_looks_at_words_and_case() -> None:
    assert exact_match(["[IN:GET  x ]\n", "a b", "A"], ["[IN:GET x ]", "b a", "a"]) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She sold 48 + 24 = <<48+24=72>>72 clips.\n#### 72", "72"),
        ("#### 1,234\nQuestion: What are 5 and 6?", "1234"),
        ("#### $-3.50", "-3.5"),
        ("The answer is 10.", "10"),
        ("10-5 is 5 and 10-4", "4"),
        ("It fell from 3 to -7 degrees.", "-7"),
        ("1,234,567.25 in all", "1234567.25"),
        ("numbers 1,2,3", "3"),
        ("12345,678", "678"),
        ("a half is .5", "0.5"),
        ("5 #### no number", "5"),
        ("none at all", None),
        ("", None),
    ],
)
def test_the_answer_of_a_solution(text: str, answer: str | None) -> None:
    assert gsm8k_answer(text) == (None if answer is None else Decimal(answer))


def test_answers_are_compared_as_numbers() -> None:
    assert answer_match(["so 72.0", "71", "no idea"], ["#### 72", "#### 72", "none"]) == pytest.approx(1 / 3)


def test_what_comes_after_the_answer_is_cut_off() -> None:
    assert cut_prediction("gsm8k", " 3 + 4 = 7\n\nQuestion: 1 + 1?\nAnswer: 2") == " 3 + 4 = 7\n"
    assert cut_prediction("top_v2", "\n [IN:X ]\nUtterance: what") == "[IN:X ]"
    assert cut_prediction("human_eval", "    return 1\n\n\ndef f(): pass") == "    return 1\n\n"
    assert cut_prediction("cnn_dm_lm", "a\n\nArticle: b") == "a\n\nArticle: b"


@pytest.mark.parametrize(
    ("dataset", "names"),
    [
        ("cnn_dm_summarization", {*ROUGE_TYPES, "bleu"}),
        ("cnn_dm_lm", {*ROUGE_TYPES, "bleu"}),
        ("xsum_summarization", {*ROUGE_TYPES, "bleu"}),
        ("human_eval", {*ROUGE_TYPES, "bleu"}),
        ("top_v2", {*ROUGE_TYPES, "bleu", "exact_match"}),
        ("gsm8k", {"exact_match"}),
        ("spec_bench", {*ROUGE_TYPES, "bleu"}),
        ("custom_jsonl", {*ROUGE_TYPES, "bleu", "exact_match"}),
        ("chat_format", {*ROUGE_TYPES, "bleu"}),
    ],
)
def test_metrics_of_a_data_set_and_of_its_samples(dataset: str, names: set[str]) -> None:
    references = [*REFERENCES, None]
    predictions = [*PREDICTIONS, "a prediction without a reference"]
    overall = metrics_for(dataset, predictions, references)
    assert overall.keys() == names
    samples = measure(dataset, predictions, references)
    assert samples[-1]["metrics"] == {}
    assert [sample["metrics"].keys() for sample in samples[:-1]] == [names] * 4
    for name in names - {"bleu"}:
        assert overall[name] == pytest.approx(sum(sample["metrics"][name] for sample in samples[:-1]) / 4)
    if "bleu" in names and dataset != "top_v2":  # which takes the first line only
        direct = sacrebleu.sentence_bleu(predictions[0], [REFERENCES[0]], lowercase=True).score
        assert samples[0]["metrics"]["bleu"] == pytest.approx(direct)
    assert combine_metrics(dataset, samples) == pytest.approx(overall)


def measure(dataset: str, predictions: list[str], references: list[str | None]) -> list[dict[str, Any]]:
    """Samples as a run keeps them."""
    samples = []
    for index, (text, reference) in enumerate(zip(predictions, references, strict=True)):
        example = Example(index=index, prompt="a", reference=reference)
        samples.append({"text": text, "reference": reference, "metrics": sample_metrics(dataset, text, example)})
    return samples


def test_metrics_are_of_what_remains_after_the_cut() -> None:
    solution = " He has 3 + 4 = 7 apples.\n\nQuestion: What is 8 + 8?\nAnswer: 16"
    assert metrics_for("gsm8k", [solution], ["#### 7"]) == {"exact_match": 1.0}
    samples = measure("gsm8k", [solution, "8"], ["#### 7", "#### 7"])
    assert [sample["metrics"] for sample in samples] == [{"exact_match": 1.0}, {"exact_match": 0.0}]
    assert combine_metrics("gsm8k", samples) == {"exact_match": 0.5}
    parse = metrics_for("top_v2", [" [IN:STOP ]\n\nUtterance: go on"], ["[IN:STOP ]"])
    assert (parse["exact_match"], parse["rouge1"]) == (1.0, 1.0)


def test_code_is_run_only_if_that_is_asked_for() -> None:
    task = {"prompt": "def one():\n", "test": "def check(f):\n    assert f() == 1\n", "entry_point": "one"}
    example = Example(index=0, prompt=task["prompt"], reference="    return 1\n", metadata=task)
    right, wrong = "    return 3 - 2\n\nprint(one(\n", "    return 3 - 1\n"
    assert "pass_at_1" not in sample_metrics("human_eval", right, example)
    found = [sample_metrics("human_eval", text, example, execute_code=True) for text in (right, wrong)]
    assert [metrics["pass_at_1"] for metrics in found] == [1.0, 0.0]
    texts = zip((right, wrong), found, strict=True)
    samples = [{"text": text, "reference": example.reference, "metrics": metrics} for text, metrics in texts]
    assert combine_metrics("human_eval", samples)["pass_at_1"] == 0.5
    assert sample_metrics("custom_jsonl", right, replace(example, reference=None), execute_code=True) == {}


def test_without_references_there_are_no_metrics() -> None:
    assert metrics_for("custom_jsonl", ["a", "b"], [None, None]) == {}
    assert combine_metrics("custom_jsonl", measure("custom_jsonl", ["a", "b"], [None, None])) == {}
    assert metrics_for("custom_jsonl", [], []) == combine_metrics("custom_jsonl", []) == {}


def test_bad_arguments() -> None:
    with pytest.raises(InvalidArgumentError, match="'squad' is not known; it can be cnn_dm_summarization, "):
        metrics_for("squad", ["a"], ["a"])
    with pytest.raises(InvalidArgumentError, match="2 predictions need as many references, got 1"):
        metrics_for("gsm8k", ["a", "b"], ["a"])
    for metric in (rouge, bleu, exact_match, answer_match):
        with pytest.raises(InvalidArgumentError, match="nothing to compare"):
            metric([], [])
        with pytest.raises(InvalidArgumentError, match="lists of texts"):
            metric("text", "text")


@pytest.mark.parametrize(("package", "metric"), [("rouge_score", rouge), ("sacrebleu", bleu)])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, package: str, metric: object) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    assert callable(metric)
    with pytest.raises(InvalidArgumentError, match=r"layerskip\[bench\]"):
        metric(["a"], ["a"])
