"""Keys of a config.json that can change the computation, and so must be understood.

A key that transformers' own configuration class of the family doesn't declare can't change what transformers computes:
it belongs to another program and is harmless. A declared key that we don't understand is refused.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from layerskip.errors import UnsupportedModelError
from layerskip.model.config.values import shown

logger = logging.getLogger(__name__)

# Keys without influence on the logits of inference: identity, training, generation defaults, library bookkeeping. The
# rule above would let most of them pass too; with the list, common checkpoints load without importing transformers.
INERT_KEYS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures attention_dropout
    attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id cache_implementation
    chunk_size_feed_forward decoder_start_token_id diversity_penalty do_sample dtype early_stopping embd_pdrop
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing id2label initializer_range is_decoder is_llama_config label2id layerskip
    length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_router_logits output_scores pad_token_id prefix pretraining_tp
    problem_type remove_invalid_values repetition_penalty resid_pdrop return_dict return_dict_in_generate
    router_aux_loss_coef router_jitter_noise sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config transformers_version
    typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache use_return_dict _from_model_config
    """.split()
)

# Keys that would change the computation; their neutral values are accepted for every family.
NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({},),
    "use_bidirectional_attention": (False,),
    "attn_logit_softcapping": (None,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "lm_head_bias": (False,),
    "full_attn_mod": (1,),  # of Phi-4-mini's remote code
    "interpolate_factor": (1,),
}


# Keys that shared code of transformers looks for even if a family doesn't declare them: during generation, a window
# shortens the cache of a family without sliding layers too.
SHARED_KEYS = frozenset("sliding_window layer_types attention_chunk_size is_causal kv_sharing_modes".split())


QUANTIZATION_METHODS = ("compressed-tensors", "gptq", "awq", "torchao")
"""Values of `quant_method` in a config.json whose weights can be read."""


def check_keys(raw: Mapping[str, Any], understood: frozenset[str], model_type: str) -> None:
    """Refuse any key that isn't known to be harmless, because ignoring it could silently change the model.

    Args:
        raw: config.json.
        understood: Keys that the family reads.
        model_type: The family.

    Raises:
        UnsupportedModelError: Naming the key, its value and what to do.
    """
    check_quantization_method(raw.get("quantization_config"))
    others = []
    for key, value in raw.items():
        if key in INERT_KEYS or key in understood or value is None or key == "quantization_config":
            continue
        if key not in NEUTRAL_VALUES:
            others.append(key)
        elif value not in NEUTRAL_VALUES[key]:
            raise UnsupportedModelError(
                f"config.json: {key} = {shown(value)} is not supported for model_type {model_type!r} "
                f"(only {NEUTRAL_VALUES[key][0]!r})"
            )
    declared = declared_keys(model_type) if others else {}
    for key in others:
        if key not in SHARED_KEYS and (key not in declared or declared[key] == raw[key]):
            logger.info("config.json: key %r is another program's: transformers doesn't use it for %r", key, model_type)
            continue
        raise UnsupportedModelError(
            f"config.json: key {key!r} = {shown(raw[key])} is not understood for model_type {model_type!r} and may "
            "change the computation; if it does not, remove it from config.json, otherwise this model is not supported "
            "yet"
        )


def check_quantization_method(given: Any) -> None:
    """Raise `UnsupportedModelError` if config.json has a `quantization_config` of a program whose weights aren't read.

    What the others' says in detail is read where the weights are (`checkpoint.quantized.scheme`).
    """
    if given is None:
        return
    method = given.get("quant_method", "unknown method") if isinstance(given, Mapping) else given
    if method not in QUANTIZATION_METHODS:
        raise UnsupportedModelError(
            f"this checkpoint is quantized ({method}), and only {', '.join(QUANTIZATION_METHODS)} are read; load the "
            "original checkpoint in float32, bfloat16 or float16"
        )


def declared_keys(model_type: str) -> Mapping[str, Any]:
    """Keys that transformers' configuration class of a family declares, each with its default."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind: Any = CONFIG_MAPPING[model_type]
    return {field.name: field.default for field in dataclasses.fields(kind)}
