"""config.json and generation_config.json of a trained model, corrected so that transformers can save them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layerskip.text.chat_template import end_of_turn_tokens

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

# Other settings are valid or not depending on these, so these come first.
MODES = ("do_sample", "num_beams", "return_dict_in_generate", "use_cache")
PRIVATE = frozenset({"transformers_version", "_from_model_config"})


def settle_generation_config(raw: Mapping[str, Any]) -> tuple["GenerationConfig", list[str]]:
    """Generation settings that transformers saves, and the names of the settings that it would refuse.

    transformers loads many settings that it refuses to save once one of them was changed. Left out are settings that
    aren't valid on their own, such as a negative length, or not with the others, such as `temperature` and `top_p`
    without `do_sample`.

    Args:
        raw: generation_config.json, or the generation settings in config.json.
    """
    given = {name: value for name, value in raw.items() if value is not None and name not in PRIVATE}
    ordered = sorted(given, key=lambda name: (name not in MODES, MODES.index(name) if name in MODES else 0))
    kept: dict[str, Any] = {}
    for name in ordered:
        try:
            _generation_config({**kept, name: given[name]}).validate(strict=True)
        except Exception:  # transformers checks some types by using them
            continue
        kept[name] = given[name]
    return _generation_config(kept), [name for name in given if name not in kept]


def generation_settings(generation_config: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's generation settings: generation_config.json, or config.json in older checkpoints."""
    if generation_config:
        return dict(generation_config)
    known = _generation_config({}).to_dict()
    return {name: value for name, value in config.items() if name in known}


def _generation_config(settings: Mapping[str, Any]) -> "GenerationConfig":
    from transformers import GenerationConfig

    return GenerationConfig(**settings)  # type: ignore[no-untyped-call]


def make_saveable(model: Any) -> None:
    """Correct a model's configurations so that every checkpoint of it can be saved and loads unchanged.

    Generation settings that transformers refuses are removed. `tie_word_embeddings` is set to what the parameters are:
    transformers loads a separate LM head from a file whose configuration calls it tied, and keeps that setting.
    """
    if getattr(model, "generation_config", None) is not None:
        model.generation_config, _ = settle_generation_config(model.generation_config.to_diff_dict())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or embedding is None:
        return
    tied = head.weight is embedding.weight
    for config in {id(each): each for each in (model.config, model.config.get_text_config())}.values():
        if hasattr(config, "tie_word_embeddings"):
            config.tie_word_embeddings = tied


def add_end_of_turn(model: Any, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Add the token that the chat template puts after an answer to the end tokens.

    A model that was trained on conversations generates this token at the end of an answer.
    """
    settings = model.generation_config
    own = settings.eos_token_id
    if own is None:
        own = model.config.get_text_config().eos_token_id
    known = [] if own is None else list(own) if isinstance(own, list | tuple) else [own]
    found = [*known, *(token for token in end_of_turn_tokens(tokenizer) if token not in known)]
    if found != known:
        settings.eos_token_id = found if len(found) > 1 else found[0]
