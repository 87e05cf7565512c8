"""What a batch does with a model: decode lines together, each with a seed of its own."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from layerskip.batch.lines import Line
from layerskip.batch.results import Record
from layerskip.decoding.adaptive.experience import Experience
from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.engine import check_prompt, choose_exit_layer, make_batch
from layerskip.decoding.output.stream import GenerationResult, GenerationStream
from layerskip.errors import OutOfMemoryError, PromptError
from layerskip.language_model import LanguageModel
from layerskip.model.noise import Purpose, make_key


@dataclass(frozen=True, kw_only=True)
class BatchWork:
    """What a worker is told; pickles."""

    load: Callable[[], LanguageModel]
    """Makes the model."""
    config: GenerationConfig
    """How to decode; its seed isn't used."""
    seed: int
    """Seed of the run, from which those of lines are made."""

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
        self._lm, self._seed = work.load(), work.seed
        self._config = self._lm.configure(work.config)
        choose_exit_layer(self._config, self._lm.decoder)
        self._tokenizer = self._lm.tokenizer
        tuned = self._lm.checkpoint.tuned
        self._experience = Experience() if tuned is None else Experience(tuned.agreement, tuned.exit_layer)

    def __call__(self, lines: Sequence[Line]) -> Iterator[list[Record]]:
        """Records of lines that are decoded together, as they are finished; those that can't be have an `error`."""
        encoded: list[tuple[Line, list[int]]] = []
        refused: list[Record] = []
        for line in lines:
            try:
                encoded.append((line, self._encode(line)))
            except PromptError as error:
                refused.append({**line.fields, "error": str(error)})
        if refused:
            yield refused
        yield from self._decode(encoded)

    def _encode(self, line: Line) -> list[int]:
        prompt = line.fields["prompt"]
        if isinstance(prompt, str):
            (tokens,) = self._lm.encode([prompt])
        else:
            tokens = self._lm.encode_chat(prompt, name=f"prompt {line.index}")
        check_prompt(tokens, self._config, self._lm.decoder, line.index)
        return tokens

    def _decode(self, encoded: Sequence[tuple[Line, list[int]]]) -> Iterator[list[Record]]:
        """Records of all lines; where the cache doesn't fit, those of each half by itself."""
        if not encoded:
            return
        seeds = [line_seed(self._seed, line.index) for line, _ in encoded]
        try:
            results = self._generate([tokens for _, tokens in encoded], seeds)
        except OutOfMemoryError as error:
            problem = str(error)
        else:
            yield [_record(line, result) for (line, _), result in zip(encoded, results, strict=True)]
            return
        if len(encoded) == 1:
            yield [{**encoded[0][0].fields, "error": problem}]
            return
        half = len(encoded) // 2
        yield from self._decode(encoded[:half])
        yield from self._decode(encoded[half:])

    def _generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[GenerationResult]:
        """Results of prompts that are decoded together, each with its own seed.

        Raises:
            OutOfMemoryError: The cache doesn't fit.
        """
        batch = make_batch(
            self._lm.decoder,
            prompts,
            self._config,
            end_tokens=[self._lm.end_tokens(prompt) for prompt in prompts],
            seed=self._seed,
            experience=self._experience,
        )
        for row, seed in zip(batch.rows, seeds, strict=True):
            row.seed = seed
        return GenerationStream(batch, self._tokenizer).run()


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
