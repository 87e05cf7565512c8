"""Metrics of texts: ROUGE, BLEU, exact match, and the answers of word problems.

Shares and F-measures are between 0 and 1; BLEU, as always, between 0 and 100.
"""

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from statistics import fmean
from typing import TYPE_CHECKING, Any

from layerskip.errors import InvalidArgumentError
from layerskip.evaluation.data.code_execution import check_completion
from layerskip.evaluation.data.templates import find_dataset

if TYPE_CHECKING:
    from layerskip.evaluation.data.datasets import Example

ROUGE_TYPES = ("rouge1", "rouge2", "rouge3", "rougeL")
ANSWER_MARK = "####"
"""Mark before the answer in GSM8K."""
NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+")


def normalize(text: str) -> str:
    """Normalize a text for ROUGE and BLEU: lower case, single spaces between words, none around them.

    Meta's benchmark uses lower case; both metrics split at white space.
    """
    return " ".join(text.lower().split())


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F-measure of words, pairs, triples and the longest common subsequence, by word stems.

    Args:
        predictions: N texts.
        references: N texts.

    Raises:
        InvalidArgumentError: None at all, not as many of one as of the other, or rouge-score isn't installed.
    """
    _check_pairs(predictions, references)
    return _mean(_rouge_of_each(predictions, references))


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of all texts together, with sacrebleu's defaults: 0 to 100.

    Raises:
        InvalidArgumentError: As `rouge`, or sacrebleu isn't installed.
    """
    _check_pairs(predictions, references)
    library = _sacrebleu()
    texts, targets = [normalize(text) for text in predictions], [normalize(text) for text in references]
    return float(library.corpus_bleu(texts, [targets]).score)


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of predictions that equal their reference apart from white space.

    Raises:
        InvalidArgumentError: None at all, or not as many of one as of the other.
    """
    _check_pairs(predictions, references)
    return fmean(map(_is_match, predictions, references))


def gsm8k_answer(text: str) -> Decimal | None:
    """The answer in a solution: the number after `####`, or else the last number; None without a number.

    Example:
        >>> gsm8k_answer("She sold 48 + 24 = 72 clips, for $1,000.50.")
        Decimal('1000.50')
    """
    _, mark, after = text.partition(ANSWER_MARK)
    marked = NUMBER.search(after) if mark else None
    numbers = [marked[0]] if marked else NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def answer_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of predictions with the reference's answer (`gsm8k_answer`); 72 and 72.0 are equal.

    Raises:
        InvalidArgumentError: None at all, or not as many of one as of the other.
    """
    _check_pairs(predictions, references)
    return fmean(map(_is_same_answer, predictions, references))


def cut_prediction(dataset: str, prediction: str) -> str:
    """The part of a text that is the answer: a model that wasn't taught to end continues with the next question.

    Raises:
        InvalidArgumentError: The data set isn't known.
    """
    text = prediction
    stops = find_dataset(dataset).stops
    if stops == ("\n",):  # the answer is a line, not necessarily the first
        text = text.lstrip()
    for stop in stops:
        text = text.partition(stop)[0]
    return text


def metrics_for(dataset: str, predictions: Sequence[str], references: Sequence[str | None]) -> dict[str, float]:
    """The metrics of a data set over all of its texts.

    Args:
        dataset: One of `DATASETS`.
        predictions: N generated texts; anything after the answer is cut off.
        references: N texts; a reference that is None is left out, and its prediction too.

    Returns:
        `rouge1`, `rouge2`, `rouge3`, `rougeL`, `bleu` and `exact_match`, those that fit the data set; empty where
        there are no references.

    Raises:
        InvalidArgumentError: The data set isn't known, not as many predictions as references, or a package is missing.
    """
    wanted = find_dataset(dataset).metrics
    _check_lengths(predictions, references)
    texts, targets = [], []
    for prediction, reference in zip(predictions, references, strict=True):
        if reference is not None:
            texts.append(cut_prediction(dataset, prediction))
            targets.append(reference)
    metrics: dict[str, float] = {}
    if not targets:
        return metrics
    if "exact_match" in wanted:
        metrics["exact_match"] = exact_match(texts, targets)
    if "answer" in wanted:
        metrics["exact_match"] = answer_match(texts, targets)
    if "rouge" in wanted:
        metrics |= rouge(texts, targets)
    if "bleu" in wanted:
        metrics["bleu"] = bleu(texts, targets)
    return metrics


def sample_metrics(dataset: str, text: str, example: "Example", *, execute_code: bool = False) -> dict[str, float]:
    """The metrics of a single text.

    The BLEU of a single text is smoothed (sacrebleu's `sentence_bleu`), because a text often has no four words in
    common with its reference.

    Args:
        dataset: One of `DATASETS`.
        text: Generated text; anything after the answer is cut off.
        example: The example of the prompt.
        execute_code: Run the text against the tests of HumanEval, for `pass_at_1`; `code_execution` names the risks.

    Returns:
        As `metrics_for`; without a reference, `pass_at_1` at most.

    Raises:
        InvalidArgumentError: The data set isn't known, or a package is missing.
    """
    wanted = find_dataset(dataset).metrics
    prediction, reference = cut_prediction(dataset, text), example.reference
    metrics: dict[str, float] = {}
    if reference is not None:
        if "exact_match" in wanted:
            metrics["exact_match"] = _is_match(prediction, reference)
        if "answer" in wanted:
            metrics["exact_match"] = _is_same_answer(prediction, reference)
        if "rouge" in wanted:
            metrics |= _rouge_of_each([prediction], [reference])[0]
        if "bleu" in wanted:
            score = _sacrebleu().sentence_bleu(normalize(prediction), [normalize(reference)]).score
            metrics["bleu"] = float(score)
    if execute_code and dataset == "human_eval":
        task = example.metadata
        execution = check_completion(task["prompt"], prediction, task["test"], task["entry_point"])
        metrics["pass_at_1"] = float(execution.passed)
    return metrics


def combine_metrics(dataset: str, samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The metrics of all texts together, from the metrics of each text.

    Args:
        dataset: One of `DATASETS`.
        samples: Each with `text`, `reference` and `metrics` (from `sample_metrics`).

    Returns:
        As `metrics_for`, and `pass_at_1` where code was run: means over the samples that have the metric, but for
        BLEU, which isn't a mean.

    Raises:
        InvalidArgumentError: The data set isn't known, or a package is missing.
    """
    find_dataset(dataset)
    names = dict.fromkeys(name for sample in samples for name in sample["metrics"])
    having = {name: [sample for sample in samples if name in sample["metrics"]] for name in names}
    metrics = {name: fmean(sample["metrics"][name] for sample in own) for name, own in having.items()}
    if "bleu" in metrics:
        texts = [cut_prediction(dataset, sample["text"]) for sample in having["bleu"]]
        metrics["bleu"] = bleu(texts, [sample["reference"] for sample in having["bleu"]])
    return metrics


def _is_match(prediction: str, reference: str) -> float:
    return float(prediction.split() == reference.split())


def _is_same_answer(prediction: str, reference: str) -> float:
    answer = gsm8k_answer(prediction)
    return float(answer is not None and answer == gsm8k_answer(reference))


def _rouge_of_each(predictions: Sequence[str], references: Sequence[str]) -> list[dict[str, float]]:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise InvalidArgumentError("ROUGE needs the package rouge-score: pip install 'layerskip[bench]'") from error
    scorer = RougeScorer(list(ROUGE_TYPES), use_stemmer=True)
    each = []
    for prediction, reference in zip(predictions, references, strict=True):
        scores = scorer.score(normalize(reference), normalize(prediction))
        each.append({name: float(scores[name].fmeasure) for name in ROUGE_TYPES})
    return each


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError as error:
        raise InvalidArgumentError("BLEU needs the package sacrebleu: pip install 'layerskip[bench]'") from error
    return sacrebleu


def _mean(each: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: fmean(scores[name] for scores in each) for name in each[0]}


def _check_lengths(predictions: Sequence[str], references: Sequence[str | None]) -> None:
    if isinstance(predictions, str) or isinstance(references, str):
        raise InvalidArgumentError("predictions and references must be lists of texts; got a single text")
    if len(predictions) != len(references):
        raise InvalidArgumentError(f"{len(predictions)} predictions need as many references, got {len(references)}")


def _check_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    _check_lengths(predictions, references)
    if not predictions:
        raise InvalidArgumentError("there is nothing to compare; give at least one prediction with its reference")
