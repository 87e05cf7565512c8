"""How lm-evaluation-harness's tasks want their texts, as a `GenerationConfig`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from layerskip.decoding.config import GenerationConfig
from layerskip.errors import InvalidArgumentError
from layerskip.language_model import LanguageModel
from layerskip.text.detokenizer import special_tokens

MAX_NEW_TOKENS = 256
"""Most tokens of a text whose task doesn't say."""
SAMPLING = ("top_k", "top_p", "min_p")
PENALTIES = ("repetition_penalty", "no_repeat_ngram_size")
HARMLESS: Mapping[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "use_cache": (True, False),
    "early_stopping": (True, False),
}
"""Arguments of transformers that change nothing with these values."""


class TaskOptions:
    """Reads tasks' `generation_kwargs` for one model."""

    def __init__(self, lm: LanguageModel, config: GenerationConfig) -> None:
        """Prepare.

        Args:
            lm: Whose tokenizer says what ends a text, and whose generation_config.json what isn't said.
            config: Strategy, drafts and seed; what tasks say wins.
        """
        self._lm = lm
        self._config = config
        self._defaults = _generation_defaults(lm)

    def read(self, options: Mapping[str, Any]) -> tuple[GenerationConfig, list[str]]:
        """A config, and the strings at which texts end.

        Raises:
            InvalidArgumentError: An option that we don't have and that would change the text, or a bad value.
        """
        from lm_eval.models.utils import normalize_gen_kwargs

        wanted: dict[str, Any] = dict(normalize_gen_kwargs(dict(options), MAX_NEW_TOKENS))
        until = self._until(wanted.pop("until"))
        fields = {"max_new_tokens": wanted.pop("max_gen_toks")} | self._sampling(wanted)
        for name, value in wanted.items():
            if value is not None and value not in HARMLESS.get(name, ()):
                raise InvalidArgumentError(
                    f"a task's generation_kwargs have {name}: {value!r}, which isn't supported; known: until, "
                    f"max_gen_toks, do_sample, temperature, {', '.join((*SAMPLING, *PENALTIES))}"
                )
        return replace(self._config, stop=self._stops(until), **fields), until

    def _stops(self, until: list[str]) -> tuple[str, ...]:
        """Stop strings; a line break beside a special token, as YAML leaves one, isn't waited for."""
        special = set(special_tokens(self._lm.tokenizer).values())
        stops = (stop.strip() if stop.strip() in special else stop for stop in until)
        return tuple(dict.fromkeys(stop for stop in stops if stop))

    def _until(self, until: list[str]) -> list[str]:
        from lm_eval.models.utils import handle_stop_sequences

        end = self._lm.tokenizer.eos_token_id
        return list(handle_stop_sequences(until, None if end is None else str(self._lm.tokenizer.decode([end]))))

    def _sampling(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Fields on the choice of tokens, taken out of `wanted`; greedy texts know penalties only."""
        samples, temperature = bool(wanted.pop("do_sample")), wanted.pop("temperature", None)
        fields: dict[str, Any] = {"do_sample": samples}
        if samples and temperature is not None:
            fields["temperature"] = temperature
        for name in (*SAMPLING, *PENALTIES):
            value = wanted.pop(name, None)
            value = self._defaults.get(name) if value is None else value
            if value is not None and (samples or name in PENALTIES):
                fields[name] = value
        return fields


def writing_config(lm: LanguageModel, exit_layer: int, config: GenerationConfig | None) -> GenerationConfig:
    """How an exit's texts are written: the whole network's as `config` says, an earlier one's token by token.

    Raises:
        InvalidArgumentError: A bad exit layer, or a config that itself stops early.
    """
    config = config or GenerationConfig()
    if not config.speculates and config.exit_layer is not None:
        raise InvalidArgumentError(
            f"generation_strategy early_exit takes no exit_layer ({config.exit_layer}) here; name the exits to "
            "evaluate in exit_layers"
        )
    config = replace(config, seed=config.seed or 0)
    if lm.config.check_exit_layer(exit_layer) == lm.decoder.num_layers:
        return config
    return replace(config, generation_strategy="early_exit", exit_layer=exit_layer, num_speculations=None)


def _generation_defaults(lm: LanguageModel) -> dict[str, Any]:
    """What generation_config.json says of how this model writes; transformers, and with it the harness, heeds it."""
    defaults = lm.checkpoint.generation_config
    return {name: defaults[name] for name in (*SAMPLING, *PENALTIES) if defaults.get(name) is not None}
