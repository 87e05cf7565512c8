"""The Python interface, spelled out: changing it is a decision, not an accident."""

import dataclasses
import inspect

import layerskip

SIGNATURES = {
    "load": "name, config, *, revision, **options",
    "LanguageModel.generate": "self, prompts, config, **options",
    "LanguageModel.stream": "self, prompts, config, *, show_drafts, session, **options",
    "LanguageModel.score": "self, prompts, continuations, *, exit_layer",
    "LanguageModel.logits": "self, token_ids, exit_layer",
    "LanguageModel.encode": "self, prompts, *, special_tokens",
    "LanguageModel.encode_chat": "self, messages, *, template, tools, variables, name",
    "LanguageModel.end_tokens": "self, prompt, template",
    "LanguageModel.new_session": "self, slots",
    "LayerSkipRecipe": "model, config, *, seed",
    "LayerSkipRecipe.begin_step": "self, step, num_steps, *, rank, world_size",
    "LayerSkipTrainer": "model, args, *, layerskip, **kwargs",
    "train": "config, output, *, resume, on_step, on_message",
}
FIELDS = {
    "GenerationConfig": """max_new_tokens generation_strategy exit_layer num_speculations do_sample temperature top_k
        top_p min_p repetition_penalty no_repeat_ngram_size frequency_penalty presence_penalty logit_bias logprobs seed
        acceptance block_verification stop eos_token_ids ignore_eos""",
    "GenerationResult": "text token_ids finish_reason stop_reason seed stats logprobs prompt_logprobs",
    "GenerationStats": """tokens prompt_tokens cached_tokens seconds time_to_first_token_s tokens_per_second rounds
        drafted accepted acceptance_rate drafted_by_position accepted_by_position drafted_by accepted_by
        mean_accepted_length layer_calls seconds_drafting seconds_verifying""",
    "TokenEvent": "index token_id text source logprobs",
    "DraftEvent": "index token_ids text drafter",
    "FinishEvent": "index text result",
    "LayerSkipConfig": """dropout_max dropout_schedule exit_loss exit_loss_scale exit_weights curriculum rotation
        exit_layers stop_gradient""",
    "ExitAdapterConfig": """exit_adapters adapter_loss adapter_vocabulary adapter_value_layers cache_states
        adapters_from""",
    "TrainingConfig": "start data recipe adapters optimization checkpoints",
    "TrainingResult": """output interrupted step num_tokens train_loss loss exits speedups long_examples precision
        seconds""",
    "Score": "token_ids token_logprobs logprob is_greedy",
}


def test_every_public_name_can_be_imported() -> None:
    assert all(getattr(layerskip, name) is not None for name in layerskip.__all__)
    assert sorted(layerskip.__all__) == sorted(
        """CheckpointConfig DataConfig DraftEvent ExitAdapterConfig FinishEvent GenerationConfig GenerationResult
        GenerationStats GenerationStream LanguageModel LayerSkipConfig LayerSkipError LayerSkipRecipe LayerSkipTrainer
        LoadingConfig OptimizationConfig Score Session StartConfig StreamEvent TokenEvent TrainingConfig
        TrainingResult __version__ load train""".split()
    )


def test_signatures() -> None:
    for path, expected in SIGNATURES.items():
        thing = layerskip
        for name in path.split("."):
            thing = getattr(thing, name)
        assert _names(thing) == expected, path


def test_fields() -> None:
    for name, expected in FIELDS.items():
        fields = [field.name for field in dataclasses.fields(getattr(layerskip, name))]
        assert fields == expected.split(), name


def _names(function: object) -> str:
    """Parameters by name, with a `*` before those that are keyword-only."""
    parts: list[str] = []
    for parameter in inspect.signature(function).parameters.values():  # type: ignore[arg-type]
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        parts.append(f"**{parameter.name}" if parameter.kind is parameter.VAR_KEYWORD else parameter.name)
    return ", ".join(parts)
