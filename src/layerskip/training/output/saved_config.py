"""config.json and generation_config.json of a model that is trained: such that they can be saved, and are true."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layerskip.text.chat_template import end_of_turn_tokens

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

# Whether other settings are valid depends on these, so they are settled first.
MODES = ("do_sample", "num_beams", "return_dict_in_generate", "use_cache")
PRIVATE = frozenset({"transformers_version", "_from_model_config"})


def settle_generation_config(raw: Mapping[str, Any]) -> tuple["GenerationConfig", list[str]]:
    """Settings of generation that transformers saves, and the names of those that it would refuse.

    transformers loads many that it refuses to save, once one of them was changed. Left out is what isn't valid on its
    own, such as a negative length, and what isn't with the others: `temperature` and `top_p` where nothing is sampled.

    Args:
        raw: generation_config.json, or what config.json says about generation.
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
    """What a checkpoint says about generation: generation_config.json, or else config.json, as it was done before."""
    if generation_config:
        return dict(generation_config)
    known = _generation_config({}).to_dict()
    return {name: value for name, value in config.items() if name in known}


def _generation_config(settings: Mapping[str, Any]) -> "GenerationConfig":
    from transformers import GenerationConfig

    return GenerationConfig(**settings)  # type: ignore[no-untyped-call]


def make_saveable(model: Any) -> None:
    """Settle a model's configurations so that every checkpoint of it can be saved, and loads as it is.

    The settings of generation are such as transformers saves. Whether the head is the embedding is what the parameters
    say: transformers takes a head of its own from a file whose configuration calls it tied, and leaves that as it was.
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
    """Name the token that the chat template puts after an answer among those that end a text.

    A model that has learned conversations writes it where others write the end of a text.
    """
    settings = model.generation_config
    own = settings.eos_token_id
    if own is None:
        own = model.config.get_text_config().eos_token_id
    known = [] if own is None else list(own) if isinstance(own, list | tuple) else [own]
    found = [*known, *(token for token in end_of_turn_tokens(tokenizer) if token not in known)]
    if found != known:
        settings.eos_token_id = found if len(found) > 1 else found[0]
