"""What a batch does with a model: decode lines, each with a seed of its own; a line joins as soon as another ends."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from layerskip.batch.lines import Line
from layerskip.batch.results import Record
from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.output.events import GenerationResult
from layerskip.decoding.request import Request, check_exit_layer
from layerskip.errors import OutOfMemoryError, PromptError
from layerskip.language_model import LanguageModel
from layerskip.model.choosing.noise import Purpose, make_key


@dataclass(frozen=True, kw_only=True)
class BatchWork:
    """What a worker is told; pickles."""

    load: Callable[[], LanguageModel]
    """Makes the model."""
    config: GenerationConfig
    """How to decode; its seed isn't used."""
    seed: int
    """Seed of the run, from which those of lines are made."""
    batch_size: int = 8
    """Lines that are decoded at once, at most."""

    def start(self) -> "BatchWorker":
        """A worker, with its model loaded.

        Raises:
            InvalidArgumentError: An exit layer that the model doesn't have.
            TokenizerError: There is no tokenizer.
        """
        return BatchWorker(self)


class BatchWorker:
    """Decodes groups of lines."""

    def __init__(self, work: BatchWork) -> None:
        """Load the model, and check what all lines share."""
        self._lm, self._seed, self._batch_size = work.load(), work.seed, work.batch_size
        self._config = self._lm.configure(work.config)
        check_exit_layer(self._config, self._lm.decoder)
        self._lm.text_tokenizer  # noqa: B018  raises if there is none

    def __call__(self, lines: Sequence[Line]) -> Iterator[list[Record]]:
        """Records of lines as they are finished; those that can't be decoded have an `error`."""
        requests: list[tuple[Line, Request]] = []
        refused: list[Record] = []
        for line in lines:
            try:
                requests.append((line, self._request(line)))
            except PromptError as error:
                refused.append({**line.fields, "error": str(error)})
        if refused:
            yield refused
        yield from self._decode(requests, self._batch_size)

    def _request(self, line: Line) -> Request:
        prompt = line.fields["prompt"]
        if isinstance(prompt, str):
            (tokens,) = self._lm.encode([prompt])
        else:
            tokens = self._lm.encode_chat(prompt, name=f"prompt {line.index}")
        return self._lm.request(tokens, self._config, seed=line_seed(self._seed, line.index), index=line.index)

    def _decode(self, requests: Sequence[tuple[Line, Request]], max_rows: int) -> Iterator[list[Record]]:
        """Records of all lines; where the cache doesn't fit, fewer are decoded at once, then each half by itself."""
        if not requests:
            return
        try:
            results = self._lm.generate_each([request for _, request in requests], max_rows=max_rows)
        except OutOfMemoryError as error:
            problem = str(error)
        else:
            for place, result in results:
                yield [_record(requests[place][0], result)]
            return
        if max_rows > 1:
            yield from self._decode(requests, max_rows // 2)
        elif len(requests) > 1:
            half = len(requests) // 2
            yield from self._decode(requests[:half], 1)
            yield from self._decode(requests[half:], 1)
        else:
            yield [{**requests[0][0].fields, "error": problem}]


def line_seed(seed: int, index: int) -> int:
    """Seed of a line: a hash of the run's seed and the line's place, 0..2^63 - 1.

    `generate` with it writes the same text.
    """
    return make_key(seed, Purpose.TARGET, index) >> 1


def _record(line: Line, result: GenerationResult) -> Record:
    return {
        **line.fields,
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "seed": result.seed,
        "stats": asdict(result.stats),
    }
