"""Descriptions of data sets: repository, columns, and the template that makes a prompt of a record.

A data set is a row of `DATASETS`. Its template is a `str.format` string over the columns of a record.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from layerskip.errors import InvalidArgumentError
from layerskip.evaluation.data.code_execution import STOP_SEQUENCES

BEGINNING_WORDS = 100
"""Words of an article that form the prompt of language modelling, as in Meta's benchmark."""
SHOT_SEPARATOR = "\n\n"

Record = Mapping[str, Any]
Message = dict[str, Any]
"""`role` and `content`, and other keys that a chat template may use."""


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One data set."""

    template: str
    """Text of a prompt, over the columns of a record and the ones that `derive` adds."""
    repository: str | None = None
    """Name on the Hugging Face hub, or a folder that `datasets` can load; None if a file must be given."""
    configuration: str | None = None
    """Name of one of the repository's data sets."""
    split: str = "test"
    """Split to measure on."""
    shot_split: str | None = None
    """Split with the examples for few-shot prompts; None takes them from the beginning of `split`."""
    columns: tuple[str, ...] = ()
    """Columns that every record must have."""
    reference: tuple[str, ...]
    """Columns with the reference; the first one that a record has counts."""
    joint: str = ""
    """Text between a prompt and its answer in a few-shot prompt."""
    stops: tuple[str, ...] = ()
    """Texts that end an answer: a model that wasn't taught to end continues with the next question."""
    metrics: tuple[str, ...] = ("rouge", "bleu")
    """Names of metrics: `rouge`, `bleu`, `exact_match`, and `answer` (the number at the end)."""
    derive: Callable[[Record, str], Record] | None = None
    """Function for more columns of a record; its second argument names the record in error messages."""
    is_chat: bool = False
    """Whether prompts are lists of messages, without a template."""


def _article_parts(record: Record, where: str) -> Record:
    """Split an article after its first words; the white space in between belongs to the rest."""
    article = text_of(record, "article", where)
    words = [match.end() for match in re.finditer(r"\S+", article)]
    end = words[BEGINNING_WORDS - 1] if len(words) > BEGINNING_WORDS else len(article)
    return {"beginning": article[:end], "rest": article[end:] or None}


def _first_turn(record: Record, where: str) -> Record:
    """The first question of a conversation; later ones would need the model's own answers."""
    turns = record["turns"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise InvalidArgumentError(
            f"{where}: column 'turns' must be a list of texts that isn't empty, got {turns!r:.80}"
        )
    references = record.get("reference")
    first = references[0] if isinstance(references, list) and references else references
    return {"prompt": turns[0], "reference": first if isinstance(first, str) and first else None}


def _conversation(record: Record, where: str) -> Record:
    """Messages before the assistant's last answer, and that answer if the conversation ends with it."""
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise InvalidArgumentError(f"{where}: column 'messages' must be a list of messages, got {messages!r:.80}")
    for message in messages:
        fields = message if isinstance(message, Mapping) else {}
        if not isinstance(fields.get("role"), str) or not isinstance(fields.get("content"), str):
            raise InvalidArgumentError(
                f'{where} must have messages such as {{"role": "user", "content": "Hello"}}, got {message!r:.80}'
            )
    answered = messages[-1]["role"] == "assistant"
    prompt = [dict(message) for message in (messages[:-1] if answered else messages)]
    if not prompt:
        raise InvalidArgumentError(f"{where} has nothing but an answer; begin the messages with a user's")
    return {"prompt": prompt, "reference": messages[-1]["content"] if answered else None}


SUMMARY_STOPS = ("\nArticle:",)

DATASETS: dict[str, DatasetSpec] = {
    "cnn_dm_summarization": DatasetSpec(
        repository="abisee/cnn_dailymail",
        configuration="3.0.0",
        shot_split="train",
        columns=("article", "highlights"),
        template="Article: {article}\nSummary:",
        reference=("highlights",),
        joint=" ",
        stops=SUMMARY_STOPS,
    ),
    "cnn_dm_lm": DatasetSpec(
        repository="abisee/cnn_dailymail",
        configuration="3.0.0",
        shot_split="train",
        columns=("article",),
        template="{beginning}",
        reference=("rest",),
        derive=_article_parts,
    ),
    "xsum_summarization": DatasetSpec(
        repository="EdinburghNLP/xsum",
        shot_split="train",
        columns=("document", "summary"),
        template="Article: {document}\nSummary:",
        reference=("summary",),
        joint=" ",
        stops=SUMMARY_STOPS,
    ),
    "human_eval": DatasetSpec(
        repository="openai/openai_humaneval",
        columns=("task_id", "prompt", "canonical_solution", "test", "entry_point"),
        template="{prompt}",
        reference=("canonical_solution",),
        stops=STOP_SEQUENCES,
    ),
    "top_v2": DatasetSpec(
        repository="WillHeld/top_v2",
        split="eval",
        shot_split="train",
        columns=("utterance", "semantic_parse"),
        template="Utterance: {utterance}\nSemantic parse:",
        reference=("semantic_parse",),
        joint=" ",
        stops=("\n",),
        metrics=("exact_match", "rouge", "bleu"),
    ),
    "gsm8k": DatasetSpec(
        repository="openai/gsm8k",
        configuration="main",
        shot_split="train",
        columns=("question", "answer"),
        template="Question: {question}\nAnswer:",
        reference=("answer",),
        joint=" ",
        stops=("\nQuestion:",),
        metrics=("answer",),
    ),
    "spec_bench": DatasetSpec(
        columns=("turns",),
        template="{prompt}",
        reference=("reference",),
        derive=_first_turn,
    ),
    "custom_jsonl": DatasetSpec(
        template="{prompt}",
        reference=("reference", "response"),
        metrics=("exact_match", "rouge", "bleu"),
    ),
    "chat_format": DatasetSpec(
        columns=("messages",),
        template="",
        reference=("reference",),
        derive=_conversation,
        is_chat=True,
    ),
}


def find_dataset(name: str) -> DatasetSpec:
    """The data set of this name.

    Raises:
        InvalidArgumentError: There is no such data set.
    """
    try:
        return DATASETS[name]
    except KeyError:
        raise InvalidArgumentError(f"dataset {name!r} is not known; it can be {', '.join(DATASETS)}") from None


def template_columns(template: str) -> list[str]:
    """Columns in a template, each once.

    Raises:
        InvalidArgumentError: The template can't be parsed, names no column, or uses more of a column than its text.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise InvalidArgumentError(
            f"template {template!r} can't be read: {error}; write columns as {{name}}, and braces as {{{{ and }}}}"
        ) from error
    names = [name for _, name, _, _ in parts if name is not None]
    if not names:
        raise InvalidArgumentError(f"template {template!r} names no column; write one as {{name}}")
    for _, name, form, conversion in parts:
        if name is not None and (not name or name.isdigit() or set(name) & set(".[") or form or conversion):
            raise InvalidArgumentError(
                f"template {template!r} must name columns as {{name}} and no more, got "
                f"{{{name}{'!' + conversion if conversion else ''}{':' + form if form else ''}}}"
            )
    return list(dict.fromkeys(names))


def read_columns(spec: DatasetSpec, record: object, where: str) -> dict[str, Any]:
    """Columns of a record that have a value, and the columns derived from them.

    Args:
        spec: The data set.
        record: A record, of any type; only a mapping is valid.
        where: Name of the record in error messages.

    Raises:
        InvalidArgumentError: The record isn't of this data set; the message says which column is missing.
    """
    if not isinstance(record, Mapping):
        raise InvalidArgumentError(f"{where} must be a JSON object with columns, got a {type(record).__name__}")
    columns = {str(name): value for name, value in record.items() if value is not None}
    for name in spec.columns:
        if name not in columns:
            raise InvalidArgumentError(f"{where} has no column {name!r}; it has {list_columns(columns)}")
    if spec.derive is not None:
        derived = {**columns, **spec.derive(columns, where)}
        columns = {name: value for name, value in derived.items() if value is not None}
    return columns


def render(template: str, columns: Record, where: str) -> str:
    """The prompt of a record.

    Raises:
        InvalidArgumentError: The template names a column that isn't there or isn't text, or the prompt is empty.
    """
    for name in template_columns(template):
        if name not in columns:
            raise InvalidArgumentError(
                f"{where} has no column {name!r}, which the template {template!r} names; it has {list_columns(columns)}"
            )
        if not isinstance(columns[name], str | int | float):
            raise InvalidArgumentError(f"{where}: column {name!r} must be a text, got {columns[name]!r:.80}")
    prompt = template.format_map(columns)
    if not prompt.strip():
        raise InvalidArgumentError(f"{where} has an empty prompt; correct or remove it")
    return prompt


def find_reference(spec: DatasetSpec, columns: Record, where: str) -> str | None:
    """The reference of a record, or None if it has none."""
    for name in spec.reference:
        if name in columns:
            return text_of(columns, name, where)
    return None


def text_of(columns: Record, name: str, where: str) -> str:
    """A column that must be text."""
    value = columns[name]
    if not isinstance(value, str):
        raise InvalidArgumentError(f"{where}: column {name!r} must be a text, got {value!r:.80}")
    return value


def list_columns(columns: Record) -> str:
    """Names of columns, for error messages."""
    return ", ".join(map(repr, columns)) if columns else "none"
