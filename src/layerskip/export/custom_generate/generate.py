"""Self-speculative decoding: a model's first layers draft tokens, and the rest of the same model verifies them.

    model.generate(**inputs, custom_generate=FOLDER, trust_remote_code=True, exit_layer=8, num_speculations=4)

The text is the one that `model.generate` gives without drafts. Written by `layerskip export transformers`.

Every module is imported here: transformers 4 copies those that this file names, and no others.

Shapes: B rows, Q prompt tokens.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, StoppingCriteriaList, StopStringCriteria
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .choice import Chooser
from .decoding import Decoder, Settings
from .defaults import EXIT_LAYER, NUM_SPECULATIONS
from .layer_ranges import LayerRanges
from .noise import draw_seed
from .rows import Rows
from .shared_cache import SharedCache
from .stopping import StopCheck

UNSUPPORTED = {
    "assistant_model": "the model's own first layers draft",
    "negative_prompt_ids": "guidance keeps a state of its own for each token",
    "negative_prompt_attention_mask": "guidance keeps a state of its own for each token",
    "synced_gpus": "rounds differ in their number of passes",
    "inputs_embeds": "prompts are token ids",
    "position_ids": "positions follow from attention_mask",
    "past_key_values": "the cache is made here",
    "cache": "the cache is made here",
    "cache_implementation": "the cache is made here",
}
"""Arguments of transformers' `generate` that are refused, each with the reason."""
STATEFUL_PROCESSORS = {"UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor"}
"""Logits processors that count on being called once for each token, in order."""
INITIAL_CAPACITY = 512
"""Tokens behind the prompt that the cache has room for at first."""


def generate(
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    model: Any,
    exit_layer: int | None = None,
    num_speculations: int | None = None,
    confidence: float | None = None,
    seed: int | None = None,
    streamer: Any = None,
    stopping_criteria: Any = None,
    **options: Any,
) -> Any:
    """Generate, with transformers' own arguments and these.

    Args:
        inputs: [B, Q] token ids; also as `input_ids`. With several rows, padded on the left.
        generation_config: As in transformers.
        model: A causal language model of transformers.
        exit_layer: E, the number of layers that draft, 1 to the number of layers - 1.
        num_speculations: K, the tokens drafted in one round; at least 1.
        confidence: Probability, above 0 and at most 1; drafting ends before a token that is less probable. By
            default, all K tokens are drafted.
        seed: Seed for `do_sample`; by default, one from torch's random numbers. For one seed, the text doesn't depend
            on `exit_layer` and `num_speculations`. All rows use the same.
        streamer: As in transformers; for a single row.
        stopping_criteria: As in transformers.
        **options: The other arguments of transformers' `generate`.

    Returns:
        What transformers' `generate` returns: token ids, or with `return_dict_in_generate` an output object, whose
        scores and logits are for a single row only.

    Raises:
        ValueError: An argument has a value that can't be used, or the model can't be run in parts.
    """
    for name, reason in UNSUPPORTED.items():
        if options.pop(name, None) not in (None, False):
            raise ValueError(f"{name} can't be used with self-speculative decoding: {reason}; leave it out")
    speculation = _check(model, exit_layer, num_speculations, confidence, seed)
    options.pop("assistant_early_exit", None)  # transformers' own way of drafting with early layers
    generation_config = _without_early_exit(generation_config)
    owner = copy.copy(model)  # shares everything but its generation_config, so that the model's stays as it is
    owner.generation_config = _without_early_exit(model.generation_config)
    criteria = StoppingCriteriaList(stopping_criteria or [])
    criteria += _stop_strings(options, generation_config or owner.generation_config)

    def decode(_: Any, input_ids: Tensor, **prepared: Any) -> Any:
        return _decode(model, input_ids, streamer=streamer, **speculation, **prepared)

    return GenerationMixin.generate(
        owner,
        inputs,
        generation_config=generation_config,
        stopping_criteria=criteria,
        streamer=streamer,
        custom_generate=decode,
        **options,
    )


def _check(
    model: Any, exit_layer: int | None, num_speculations: int | None, confidence: float | None, seed: int | None
) -> dict[str, Any]:
    """Check our own arguments, and fill in the defaults."""
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError("gradient checkpointing keeps no cache in training mode; call model.eval() first")
    if exit_layer is None:
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        exit_layer = EXIT_LAYER or max(1, layers // 3)
    num_speculations = NUM_SPECULATIONS if num_speculations is None else num_speculations
    for name, value in (("exit_layer", exit_layer), ("num_speculations", num_speculations)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; use a whole number from 1")
    if confidence is not None and not 0 < confidence <= 1:
        raise ValueError(f"confidence is {confidence!r}; use a probability above 0 and at most 1, or None")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ValueError(f"seed is {seed!r}; use a whole number, or None")
    return {
        "ranges": LayerRanges(model, exit_layer),
        "num_speculations": num_speculations,
        "confidence": confidence,
        "seed": seed,
    }


def _without_early_exit(config: GenerationConfig | None) -> GenerationConfig | None:
    """A configuration that doesn't ask for transformers' own way of drafting with early layers."""
    if getattr(config, "assistant_early_exit", None) is None:
        return config
    config = copy.deepcopy(config)
    config.assistant_early_exit = None  # type: ignore[union-attr]
    return config


def _stop_strings(options: dict[str, Any], config: Any) -> list[Any]:
    """The criterion for `stop_strings`: transformers doesn't give the tokenizer to functions that generate."""
    tokenizer = options.pop("tokenizer", None)
    strings = options.pop("stop_strings", None) or getattr(config, "stop_strings", None)
    if not strings:
        return []
    if tokenizer is None:
        raise ValueError("stop_strings needs the tokenizer; pass it as tokenizer=")
    return [StopStringCriteria(tokenizer, strings)]


def _decode(
    model: Any,
    input_ids: Tensor,
    *,
    ranges: LayerRanges,
    num_speculations: int,
    confidence: float | None,
    seed: int | None,
    streamer: Any,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    attention_mask: Tensor | None = None,
    **model_options: Any,
) -> Any:
    """What transformers calls with everything prepared."""
    batch = input_ids.shape[0]
    _refuse_settings(generation_config, logits_processor, stopping_criteria, batch, streamer)
    _refuse_model_options(model_options)
    config = model.config.get_text_config(decoder=True)
    _refuse_scaling(config, input_ids.shape[1], generation_config.max_length)
    settings = Settings(
        num_speculations=num_speculations,
        max_length=stopping_criteria.max_length or generation_config.max_length,
        confidence=confidence,
        prefill_chunk_size=getattr(generation_config, "prefill_chunk_size", None),
        keep_scores=bool(generation_config.output_scores or generation_config.output_logits),
    )
    rows = Rows(input_ids, _paddings(attention_mask, batch), settings.max_length + num_speculations + 1)
    if generation_config.do_sample and seed is None:
        seed = draw_seed()
    decoder = Decoder(
        ranges=ranges,
        rows=rows,
        chooser=Chooser(logits_processor, rows, seed if generation_config.do_sample else None),
        stop=StopCheck(stopping_criteria, rows),
        cache=SharedCache(min(rows.ids.shape[1], input_ids.shape[1] + INITIAL_CAPACITY)),
        settings=settings,
        streamer=streamer,
    )
    decoder.run()
    if streamer is not None:
        streamer.end()
    return _result(decoder, generation_config)


def _refuse_settings(config: Any, processors: Any, criteria: Any, batch: int, streamer: Any) -> None:
    """Refuse what these rounds can't do."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) or config.num_return_sequences > 1:
        raise ValueError(
            "self-speculative decoding is for greedy decoding and sampling of one sequence for each prompt, not for "
            f"{mode.value} with num_beams={config.num_beams} and num_return_sequences={config.num_return_sequences}; "
            "repeat a prompt in the batch for several samples"
        )
    if config.output_attentions or config.output_hidden_states:
        raise ValueError("output_attentions and output_hidden_states can't be had from drafts; leave them out")
    stateful = sorted({type(item).__name__ for item in processors} & STATEFUL_PROCESSORS)
    if stateful:
        raise ValueError(f"{', '.join(stateful)} can't be undone for rejected drafts; leave that setting out")
    if batch == 1:
        return
    if streamer is not None or config.output_scores or config.output_logits:
        raise ValueError(
            f"streamer, output_scores and output_logits are for one prompt, not for {batch}; leave them out"
        )
    if any(type(item).__name__ == "PrefixConstrainedLogitsProcessor" for item in processors):
        raise ValueError(f"prefix_allowed_tokens_fn is for one prompt, not for {batch}; call generate for each")
    if len(criteria) > 1 and config._pad_token_tensor is None:
        raise ValueError(f"{batch} prompts may end at different lengths; set pad_token_id")


def _refuse_model_options(options: dict[str, Any]) -> None:
    """Refuse inputs of a model beyond token ids; transformers adds some that are made here anyway."""
    made_here = {"position_ids", "use_cache", "cache", "past_key_values", "cache_position", "logits_to_keep"}
    unknown = sorted(name for name, value in options.items() if name not in made_here and value is not None)
    if unknown:
        raise ValueError(
            f"self-speculative decoding takes token ids and their mask only; leave out {', '.join(unknown)}"
        )


def _refuse_scaling(config: Any, prompt: int, max_length: int) -> None:
    """Refuse rotary embeddings that change while a text grows: plain decoding changes them at each token."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type"))
    if kind == "dynamic" and max_length > config.max_position_embeddings:
        raise ValueError(
            f"beyond {config.max_position_embeddings} tokens, this model's rotary embeddings change with each token; "
            f"use a max_length of at most {config.max_position_embeddings} instead of {max_length}"
        )
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    if kind == "longrope" and original and prompt <= original < max_length:
        raise ValueError(
            f"this model reads all tokens again with other rotary embeddings where a text reaches {original} tokens; "
            f"use a max_length of at most {original} instead of {max_length}, or generate without custom_generate"
        )


def _paddings(attention_mask: Tensor | None, batch: int) -> list[int]:
    """[B] padding tokens at the left of each prompt."""
    if attention_mask is None:
        return [0] * batch
    mask = attention_mask.bool()
    paddings: list[int] = (~mask).sum(dim=1).tolist()
    columns = torch.arange(mask.shape[1], device=mask.device)
    is_left = mask == (columns >= torch.tensor(paddings, device=mask.device).unsqueeze(1))
    if not bool(is_left.all()) or max(paddings) == mask.shape[1]:
        raise ValueError(
            "attention_mask has zeros that are no padding on the left, or a row of zeros alone; set "
            "padding_side='left' in the tokenizer"
        )
    return paddings


def _result(decoder: Decoder, config: Any) -> Any:
    rows = decoder.rows
    sequences = rows.ids[:, : max(rows.lengths)].clone()
    for row, length in enumerate(rows.lengths):
        if length < sequences.shape[1]:
            sequences[row, length:] = config._pad_token_tensor
    if not config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences,  # type: ignore[arg-type]
        scores=tuple(decoder.scores) if config.output_scores else None,  # type: ignore[arg-type]
        logits=tuple(decoder.logits) if config.output_logits else None,  # type: ignore[arg-type]
    )
