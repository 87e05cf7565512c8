"""Many prompts from a file of JSON lines: decoded in batches, kept as they come, written in order at the end.

A line's text depends on the line, its place, the model and the configuration, and on nothing else: its seed comes from
the run's and its place (`line_seed`), and rows of a batch don't know of one another. Two exceptions: with `rejection`
acceptance a text also depends on the plans of adaptive decoding, and kernels that round a product of several rows
otherwise than that of one (those of torch) may swap two tokens of nearly the same score.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip.batch.results import PartialResults, Record
from layerskip.decoding.config import GenerationConfig
from layerskip.errors import InvalidArgumentError, OutOfMemoryError, PromptError
from layerskip.files import parse_json
from layerskip.json_lines import numbered_lines, read_utf8

if TYPE_CHECKING:
    from layerskip.language_model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the input."""

    index: int
    """Its place among the lines that aren't blank."""
    fields: Record
    """What its record starts with: `index`, its own `id` if it has one, and the prompt."""
    error: str | None = None
    """Why it can't be decoded, where that shows without a model."""

    @property
    def size(self) -> int:
        """About how long its prompt is: characters."""
        prompt = self.fields["prompt"]
        return len(prompt) if isinstance(prompt, str) else sum(len(message["content"]) for message in prompt)


Mapper = Callable[[Sequence[Sequence[Line]]], Iterator[tuple[int, list[Record]]]]
"""Decodes batches of lines, here or elsewhere: pairs of a batch's place and its records, in any order."""


@dataclass(frozen=True, kw_only=True)
class BatchSummary:
    """What was done."""

    lines: int
    """Lines of the output."""
    resumed: int
    """Of these, lines that an earlier run had finished."""
    errors: int
    """Lines that couldn't be decoded."""
    tokens: int
    """Tokens of all lines."""
    seconds: float
    """Of this run, without loading."""
    tokens_per_second: float
    """Of this run."""


def line_seed(seed: int, index: int) -> int:
    """Seed of a line: a hash of the run's seed and the line's place, 0..2^63 - 1.

    `generate` with it writes the same text.
    """
    from layerskip.model.noise import Purpose, make_key  # needs torch, and reading lines doesn't

    return make_key(seed, Purpose.TARGET, index) >> 1


def read_lines(path: Path, field: str = "prompt") -> tuple[list[Line], str]:
    """Lines of a file with a JSON object each; blank ones don't count.

    Args:
        path: The file.
        field: Name of the field that holds the prompt: a text, or a list of chat messages (`role` and `content`).

    Returns:
        The lines, and a hash of the file's content (SHA-256). A line that is no such object has an `error`.

    Raises:
        InvalidArgumentError: The file can't be read or has no lines, or none of them has the field.
    """
    text = read_utf8(path, "input")
    texts = [line for _, line in numbered_lines(text)]
    if not texts:
        raise InvalidArgumentError(f"input {path} has no lines; give a JSON object with a {field!r} on each")
    lines = [_read_line(index, line, field) for index, line in enumerate(texts)]
    if all("prompt" not in line.fields for line in lines):
        raise InvalidArgumentError(f"input {path}: {lines[0].error}, and so on; name the prompt's field with --field")
    return lines, hashlib.sha256(path.read_bytes()).hexdigest()


def _read_line(index: int, text: str, field: str) -> Line:
    fields: Record = {"index": index}

    def wrong(why: str) -> Line:
        return Line(index=index, fields=fields, error=f"prompt {index} {why}")

    try:
        record = parse_json(text)
        json.dumps(record, ensure_ascii=False).encode()  # JSON can spell half a character, which isn't text
    except UnicodeEncodeError as error:
        return wrong(f"spells half a character: {error}")
    except (ValueError, RecursionError) as error:
        return wrong(f"is not JSON: {error}")
    if not isinstance(record, dict):
        return wrong(f"must be a JSON object, got a {type(record).__name__}")
    if "id" in record:
        fields["id"] = record["id"]
    if field not in record:
        return wrong(f"has no field {field!r}; it has {', '.join(map(repr, record)) or 'none'}")
    fields["prompt"] = prompt = record[field]
    if not isinstance(prompt, str) and not _is_chat(prompt):
        kind = type(prompt).__name__
        return wrong(f"must be a text, or a list of messages that have a 'role' and a 'content', got a {kind}")
    return Line(index=index, fields=fields) if prompt else wrong("is empty; give at least one character")


def _is_chat(prompt: object) -> bool:
    return isinstance(prompt, list) and all(
        isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in prompt
    )


class LineDecoder:
    """Decodes batches of lines with a model of its own."""

    def __init__(self, lm: "LanguageModel", config: GenerationConfig, seed: int) -> None:
        """Check what all lines share.

        Args:
            lm: The model.
            config: How to decode; its seed isn't used.
            seed: That of the run.

        Raises:
            InvalidArgumentError: An exit layer that the model doesn't have.
            TokenizerError: There is no tokenizer.
        """
        from layerskip.decoding.request import check_exit_layer

        self._lm, self._config, self._seed = lm, lm.configure(config), seed
        check_exit_layer(self._config, lm.decoder)
        lm.tokenizer  # noqa: B018  raises without one

    def __call__(self, lines: Sequence[Line]) -> list[Record]:
        """Records of lines that are decoded together, in their order; those that can't be have an `error`."""
        records: dict[int, Record] = {}
        prompts: dict[int, list[int]] = {}
        for line in lines:
            try:
                prompts[line.index] = self._encode(line)
            except PromptError as error:
                records[line.index] = {**line.fields, "error": str(error)}
        records |= self._decode([line for line in lines if line.index in prompts], prompts)
        return [records[line.index] for line in lines]

    def _encode(self, line: Line) -> list[int]:
        from layerskip.decoding.request import check_prompt

        prompt = line.fields["prompt"]
        if isinstance(prompt, str):
            (tokens,) = self._lm.encode([prompt])
        else:
            tokens = self._lm.encode_chat(prompt, name=f"prompt {line.index}")
        check_prompt(tokens, self._config, self._lm.decoder, line.index)
        return tokens

    def _decode(self, lines: Sequence[Line], prompts: Mapping[int, list[int]]) -> dict[int, Record]:
        """Records by index. Where the cache doesn't fit, the batch is halved."""
        if not lines:
            return {}
        requests = [
            self._lm.request(prompts[line.index], self._config, seed=line_seed(self._seed, line.index))
            for line in lines
        ]
        try:
            stream = self._lm.start(requests)
        except OutOfMemoryError as error:
            if len(lines) == 1:
                return {lines[0].index: {**lines[0].fields, "error": str(error)}}
            half = len(lines) // 2
            return self._decode(lines[:half], prompts) | self._decode(lines[half:], prompts)
        results = stream.run()
        return {
            line.index: {
                **line.fields,
                "text": result.text,
                "token_ids": result.token_ids,
                "finish_reason": result.finish_reason,
                "seed": result.seed,
                "stats": asdict(result.stats),
            }
            for line, result in zip(lines, results, strict=True)
        }


def load_decoder(model: Mapping[str, Any], config: GenerationConfig, seed: int) -> LineDecoder:
    """A decoder with a model that is loaded for it.

    Args:
        model: Arguments of `layerskip.load`.
        config: How to decode.
        seed: That of the run.
    """
    from layerskip.language_model import load

    return LineDecoder(load(**model), config, seed)


def map_here(decode: LineDecoder, batches: Sequence[Sequence[Line]]) -> Iterator[tuple[int, list[Record]]]:
    """The mapper of a single process: one batch after the other."""
    for place, lines in enumerate(batches):
        yield place, decode(lines)


def run_batch(
    lines: Sequence[Line],
    results: PartialResults,
    mapper: Mapper,
    *,
    batch_size: int = 8,
    on_progress: Callable[[int], None] = lambda done: None,
) -> BatchSummary:
    """Decode the lines that aren't finished yet, and write the output.

    Args:
        lines: From `read_lines`.
        results: Keeps every finished line.
        mapper: Decodes batches: `functools.partial(map_here, decoder)`, or one that shares them out.
        batch_size: Most prompts to decode together.
        on_progress: Told how many lines are finished, first those of an earlier run.

    Raises:
        InvalidArgumentError: A batch size below 1.
        LayerSkipError: Anything that concerns all lines; those that are finished are kept.
    """
    if batch_size < 1:
        raise InvalidArgumentError(f"batch_size must be at least 1, got {batch_size}")
    resumed, tokens = len(results.offsets), results.tokens
    on_progress(resumed)
    started = time.perf_counter()
    left = [line for line in lines if line.index not in results.offsets]
    broken = [{**line.fields, "error": line.error} for line in left if line.error is not None]
    results.add(broken)
    on_progress(len(broken))
    # The longest come first: if memory is short, that shows at once, and at the end no worker waits for a long one.
    whole = sorted((line for line in left if line.error is None), key=lambda line: -line.size)
    batches = [whole[i : i + batch_size] for i in range(0, len(whole), batch_size)]
    for _, records in mapper(batches) if batches else ():
        results.add(records)
        on_progress(len(records))
    seconds = time.perf_counter() - started
    results.finish()
    return BatchSummary(
        lines=len(lines),
        resumed=resumed,
        errors=results.errors,
        tokens=results.tokens,
        seconds=seconds,
        tokens_per_second=(results.tokens - tokens) / seconds if seconds > 0 else 0.0,
    )
