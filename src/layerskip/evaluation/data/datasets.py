"""Data sets from the Hugging Face hub or a file, as prompts with references."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip.decoding.config import GenerationConfig
from layerskip.errors import InvalidArgumentError
from layerskip.evaluation.data.templates import (
    DATASETS,
    SHOT_SEPARATOR,
    DatasetSpec,
    Message,
    find_dataset,
    find_reference,
    read_columns,
    render,
    template_columns,
)
from layerskip.files import parse_json
from layerskip.json_lines import numbered_lines, read_utf8

if TYPE_CHECKING:
    from layerskip.language_model import LanguageModel

__all__ = ["DATASETS", "Example", "encode_examples", "load_examples"]

PARQUET_REVISION = "refs/convert/parquet"
"""Branch in which the hub keeps every public data set as Parquet files."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt with its reference."""

    index: int
    """Index in the file or split, from 0."""
    prompt: str | list[Message]
    """A text, or the messages of a chat."""
    reference: str | None
    """The reference answer."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """The record's own columns, such as `test` and `entry_point` of HumanEval."""


@dataclass(frozen=True, kw_only=True)
class _Records:
    """Records as read, not yet checked."""

    rows: Sequence[Any]
    source: str
    """File, or repository and split."""
    lines: Sequence[int] = ()
    """Each record's line in the file, if it has lines."""

    def where(self, place: int) -> str:
        return f"{self.source}, line {self.lines[place]}" if self.lines else f"{self.source}, record {place}"


def load_examples(
    name: str,
    *,
    data_path: Path | None = None,
    num_samples: int | None = None,
    n_shot: int = 0,
    template: str | None = None,
    shuffle_seed: int | None = None,
    split: str | None = None,
    repository: str | None = None,
) -> list[Example]:
    """Read a data set and make its prompts.

    Args:
        name: One of `DATASETS`.
        data_path: A .jsonl file, or a .json file with a list, of records with the data set's columns; from the hub if
            not given.
        num_samples: Number of examples, at most; all if not given.
        n_shot: Solved examples that each prompt begins with. They are the first of the file, or of the hub's `train`
            split if the data set has one, and are never prompts themselves.
        template: Text of a prompt, with columns in braces; the data set's own if not given.
        shuffle_seed: Draw examples at random instead of taking the first ones.
        split: Another split of the hub's data set.
        repository: Another repository of the hub, or a folder that `datasets` can load, with the same columns.

    Returns:
        At least one example: in the order of the source, or of the draw.

    Raises:
        InvalidArgumentError: A name, number or template that can't be used, a file or repository that can't be read,
            or records without the columns that are needed.
    """
    spec = find_dataset(name)
    _check_arguments(name, spec, data_path, num_samples, n_shot, template, split, repository)
    template = spec.template if template is None else template
    records, shots = _open(name, spec, data_path, repository, split, n_shot)
    return _ask(spec, template, records, shots, num_samples, n_shot, shuffle_seed)


def encode_examples(lm: "LanguageModel", examples: Sequence[Example], config: GenerationConfig) -> list[list[int]]:
    """Token ids of the prompts; messages go through the tokenizer's chat template, up to where the answer begins.

    Args:
        lm: The model.
        examples: Examples to encode.
        config: Configuration of the decoding.

    Raises:
        PromptError: A prompt leaves no room for an answer, or the chat template refuses it; the message names the
            example.
        TokenizerError: There is no tokenizer, or no chat template for messages.
    """
    from layerskip.checks import check_text
    from layerskip.decoding.request import check_prompt  # needs torch, and reading data sets doesn't

    encoded = []
    for example in examples:
        if isinstance(example.prompt, str):
            check_text(example.prompt, f"prompt {example.index}")
            (tokens,) = lm.encode([example.prompt])
        else:
            tokens = lm.encode_chat(example.prompt, name=f"example {example.index}")
        check_prompt(tokens, config, lm.decoder, example.index)
        encoded.append(tokens)
    return encoded


def _ask(
    spec: DatasetSpec,
    template: str,
    records: _Records,
    shots: _Records,
    num_samples: int | None,
    n_shot: int,
    shuffle_seed: int | None,
) -> list[Example]:
    """Make the prompts of the selected records."""
    begin, shown = _few_shot(spec, template, shots, n_shot)
    order = list(range(n_shot if shots is records else 0, len(records.rows)))
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(order)
    examples: list[Example] = []
    for place in order:
        if num_samples is not None and len(examples) == num_samples:
            break
        example = _make_example(spec, template, records, place)
        if not shown:
            examples.append(example)
        elif example.prompt not in shown:  # some data sets contain duplicates
            examples.append(replace(example, prompt=f"{begin}{example.prompt}"))
    if not examples:
        raise InvalidArgumentError(
            f"n_shot must leave records to ask: {records.source} has {len(records.rows)}, got n_shot {n_shot}"
        )
    return examples


def _open(
    name: str, spec: DatasetSpec, data_path: Path | None, repository: str | None, split: str | None, n_shot: int
) -> tuple[_Records, _Records]:
    """Records for prompts, and records that begin with the solved examples; often the same."""
    if data_path is not None:
        records = shots = _read_file(data_path)
    else:
        split = split or spec.split
        records = shots = _read_hub(name, spec, repository, split)
        if n_shot and spec.shot_split not in (None, split):
            shots = _read_hub(name, spec, repository, f"{spec.shot_split}[:{n_shot}]")
    if not len(records.rows):
        raise InvalidArgumentError(f"{records.source} has no records; give a data set that isn't empty")
    return records, shots


def _check_arguments(
    name: str,
    spec: DatasetSpec,
    data_path: Path | None,
    num_samples: int | None,
    n_shot: int,
    template: str | None,
    split: str | None,
    repository: str | None,
) -> None:
    if num_samples is not None and num_samples < 1:
        raise InvalidArgumentError(f"num_samples must be at least 1, got {num_samples}; leave it out for all")
    if n_shot < 0:
        raise InvalidArgumentError(f"n_shot must be 0 or more, got {n_shot}")
    if spec.is_chat and (n_shot or template is not None):
        given = f"n_shot {n_shot}" if n_shot else f"template {template!r}"
        raise InvalidArgumentError(f"{name} takes the messages as they are, got {given}; put it into the messages")
    if template is not None:
        template_columns(template)  # finds a bad template before a download
    if data_path is not None and (split is not None or repository is not None):
        given = f"split {split!r}" if split is not None else f"repository {repository!r}"
        raise InvalidArgumentError(f"{given} belongs to the hub, and data_path is a file; give one or the other")
    if data_path is None and repository is None and spec.repository is None:
        what = "turns" if name == "spec_bench" else "messages" if spec.is_chat else "prompt and reference"
        raise InvalidArgumentError(f"{name} needs data_path (--data-path): a .jsonl file with {what}")


def _few_shot(spec: DatasetSpec, template: str, shots: _Records, number: int) -> tuple[str, set[str]]:
    """The solved examples at the start of few-shot prompts, and the questions in them."""
    if number > len(shots.rows):
        raise InvalidArgumentError(f"n_shot must be at most {len(shots.rows)}, the records of {shots.source}: {number}")
    begin, shown = "", set[str]()
    for place in range(number):
        shot = _make_example(spec, template, shots, place)
        if shot.reference is None:
            raise InvalidArgumentError(
                f"{shots.where(place)} has no reference ({', '.join(spec.reference)}), which n_shot {number} needs; "
                "put records with one first, or set n_shot to 0"
            )
        prompt = str(shot.prompt)
        joint = "" if prompt[-1].isspace() else spec.joint
        begin += prompt + joint + shot.reference.rstrip() + SHOT_SEPARATOR
        shown.add(prompt)
    return begin, shown


def _make_example(spec: DatasetSpec, template: str, records: _Records, place: int) -> Example:
    row, where = records.rows[place], records.where(place)
    columns = read_columns(spec, row, where)
    prompt = columns["prompt"] if spec.is_chat else render(template, columns, where)
    return Example(index=place, prompt=prompt, reference=find_reference(spec, columns, where), metadata=dict(row))


def _read_hub(name: str, spec: DatasetSpec, repository: str | None, split: str) -> _Records:
    """Load a split; the hub's library keeps it on disk after the first time."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InvalidArgumentError(
            f"data set {name} needs the package datasets: pip install 'layerskip[bench]'; or give a file: --data-path"
        ) from error
    # Other repositories may not have the same configurations.
    source, configuration = (spec.repository, spec.configuration) if repository is None else (repository, None)
    try:
        try:
            rows = load_dataset(source, configuration, split=split)
        except RuntimeError as error:
            # A repository that still needs its own loading script, which is no longer run.
            if "scripts are no longer supported" not in str(error):
                raise
            rows = load_dataset(source, configuration, split=split, revision=PARQUET_REVISION)
    except Exception as error:  # datasets raises nearly anything here, from ValueError to those of its HTTP library
        columns = ", ".join(spec.columns) or "prompt, reference"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InvalidArgumentError(
            f"data set {name} ({source}, split {split}) can't be loaded: {reason}; "
            f"connect to the Hugging Face hub, or give a .jsonl file with {columns}: --data-path FILE"
        ) from error
    return _Records(rows=rows, source=f"{source}, split {split}")


def _read_file(path: Path) -> _Records:
    """Records of a .jsonl file, or of the list in a .json file."""
    if path.suffix.lower() not in (".jsonl", ".json"):
        raise InvalidArgumentError(f"data_path must be a .jsonl or .json file, got {path}")
    text = read_utf8(path, "data_path")
    if not text.strip():
        raise InvalidArgumentError(f"data_path {path} is empty; give a file with records")
    if path.suffix.lower() == ".json":
        rows = _parse(text, str(path), 1)
        if not isinstance(rows, list):
            raise InvalidArgumentError(
                f"{path} must hold a list of records, got a {type(rows).__name__}; or use .jsonl"
            )
        return _Records(rows=rows, source=str(path))
    numbered = [(number, _parse(line, str(path), number)) for number, line in numbered_lines(text)]
    return _Records(rows=[row for _, row in numbered], source=str(path), lines=[number for number, _ in numbered])


def _parse(text: str, source: str, first_line: int) -> Any:
    try:
        value = parse_json(text)
        if "\\u" in text:  # JSON can spell half a character, which isn't text for a tokenizer
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise InvalidArgumentError(f"{source}, line {line} is not JSON: {error.msg}; correct or remove it") from error
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(f"{source}, line {first_line} spells half a character: {error}") from error
    except ValueError as error:
        raise InvalidArgumentError(f"{source}, line {first_line} can't be read: {error}") from error
    return value
