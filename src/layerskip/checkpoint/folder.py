"""A checkpoint in Hugging Face's format: a folder with config.json, safetensors and a tokenizer."""

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip.checkpoint.contents import Contents
from layerskip.checkpoint.json_file import read_json
from layerskip.checkpoint.quantized.scheme import read_scheme
from layerskip.checkpoint.quantized.tensors import QuantizedTensors
from layerskip.checkpoint.safetensors import SafetensorsFiles, find_weight_files, instead
from layerskip.errors import CheckpointError, TokenizerError, brief
from layerskip.text.tokenizer import TextTokenizer, Tokenizer
from layerskip.text.tokenizer_folder import TokenizerFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
TUNED_FILE = "layerskip.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


@dataclass(frozen=True)
class HuggingFaceFolder:
    """The folder's files, each read when it is first asked for (`checkpoint.CheckpointFiles`)."""

    folder: Path

    @property
    def hugging_face_folder(self) -> Path:
        """The folder itself."""
        return self.folder

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        """Contents of config.json."""
        path = self.folder / "config.json"
        if not path.is_file():
            raise CheckpointError(f"{self.folder} is not a checkpoint: it has no config.json{instead(self.folder)}")
        return read_json(path)

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """Contents of generation_config.json; empty where there is none."""
        path = self.folder / "generation_config.json"
        return read_json(path) if path.is_file() else {}

    @cached_property
    def weights(self) -> SafetensorsFiles | QuantizedTensors:
        """The tensors.

        Raises:
            UnsupportedModelError: They are quantized in a way that isn't read.
            WeightsError: There are none, or a file is damaged.
        """
        given = self.raw_config.get("quantization_config") if (self.folder / "config.json").is_file() else None
        scheme = None if given is None else read_scheme(given)
        files = SafetensorsFiles(find_weight_files(self.folder))
        return files if scheme is None else QuantizedTensors(files, scheme)

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer, as transformers has it.

        Raises:
            TokenizerError: There is none, or it can't be read.
        """
        self._check_tokenizer_files()
        try:
            tokenizer: PreTrainedTokenizerBase = self._tokenizer_class().from_pretrained(
                self.folder, local_files_only=True
            )
            tokenizer.decode(tokenizer("a")["input_ids"])  # values of wrong kinds show when they are used
        except Exception as error:  # transformers raises nearly anything here, from KeyError to bare Exception
            raise TokenizerError(f"the tokenizer in {self.folder} can't be read: {brief(error)}") from error
        return tokenizer

    @property
    def text_tokenizer(self) -> Tokenizer:
        """What turns text into tokens and back, without transformers where that gives the same.

        It is transformers' tokenizer once somebody has asked for that: they may have changed it.

        Raises:
            TokenizerError: There is none, or it can't be read.
        """
        if "tokenizer" in vars(self):
            return self.tokenizer
        return self._own_tokenizer or self.tokenizer

    @cached_property
    def _own_tokenizer(self) -> TextTokenizer | None:
        """The tokenizer without transformers; None where only transformers can read it."""
        self._check_tokenizer_files()
        files = TokenizerFolder(self.folder)
        reason = files.why_transformers()
        if reason is None:
            return files.read()
        logger.info("%s: transformers reads the tokenizer, which takes longer: %s", self.folder, reason)
        return None

    def _check_tokenizer_files(self) -> None:
        if not any((self.folder / file).is_file() for file in TOKENIZER_FILES):
            raise TokenizerError(
                f"{self.folder} has no tokenizer (tokenizer.json); copy the one that the model was trained with there, "
                "or pass token ids in place of text"
            )

    def _tokenizer_class(self) -> Any:
        """What reads the tokenizer in transformers.

        Where tokenizer_config.json asks for tokenizer.json as it stands, that is what counts. transformers' own choice
        would be the family's class for some families (qwen2), which splits text in Qwen's way whatever tokenizer.json
        says: other tokens than the model was trained on, without a word.
        """
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        return PreTrainedTokenizerFast if TokenizerFolder(self.folder).as_it_stands else AutoTokenizer

    @property
    def tuned_file(self) -> Path:
        """Where a sweep keeps the best setting."""
        return self.folder / TUNED_FILE

    @property
    def adapters_folder(self) -> Path:
        """Where exit adapters that belong to the model are: with it."""
        return self.folder

    @property
    def contents(self) -> Contents:
        """Bytes and types of the tensors."""
        return self.weights.contents()
