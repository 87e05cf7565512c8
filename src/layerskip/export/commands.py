"""Commands with which other engines use a draft model."""

import json
import shlex
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EngineCommand:
    """What to run in one engine."""

    engine: str
    command: str
    """For a shell, or of transformers in Python; may have several lines."""
    remark: str = ""


def engine_commands(
    *, model: str, source: str, draft: str, exit_layer: int, num_speculations: int
) -> tuple[EngineCommand, ...]:
    """A command for each engine that takes draft models.

    Args:
        model: The whole model for engines that read Hugging Face's format: a folder or a hub id.
        source: The same as `layerskip` calls it.
        draft: Folder of the draft model.
        exit_layer: E, its layers.
        num_speculations: K, drafts in a round.
    """
    config = {"method": "draft_model", "model": draft, "num_speculative_tokens": num_speculations}
    whole, folder, named = shlex.quote(model), shlex.quote(draft), shlex.quote(source)
    return (
        EngineCommand(
            engine="vLLM", command=f"vllm serve {whole} --speculative-config {shlex.quote(json.dumps(config))}"
        ),
        EngineCommand(
            engine="SGLang",
            command=f"python -m sglang.launch_server --model-path {whole} --speculative-algorithm STANDALONE "
            f"--speculative-draft-model-path {folder} --speculative-num-steps {num_speculations} "
            f"--speculative-eagle-topk 1 --speculative-num-draft-tokens {num_speculations + 1}",
        ),
        EngineCommand(
            engine="llama.cpp",
            command=f"layerskip export gguf --model {named} --output main.gguf\n"
            f"layerskip export gguf --model {named} --exit-layer {exit_layer} --output draft.gguf\n"
            f"llama-server -m main.gguf -md draft.gguf --spec-type draft-simple --spec-draft-n-max {num_speculations}",
            remark=f"versions without --spec-type: llama-server -m main.gguf -md draft.gguf --draft-max "
            f"{num_speculations}",
        ),
        EngineCommand(
            engine="TensorRT-LLM",
            command="cat > draft_target.yaml <<'END'\n"
            "speculative_config:\n"
            "  decoding_type: Draft_Target\n"
            f"  max_draft_len: {num_speculations}\n"
            f"  speculative_model: {json.dumps(draft)}\n"
            "END\n"
            f"trtllm-serve {whole} --extra_llm_api_options draft_target.yaml",
            remark="older versions call the last key speculative_model_dir",
        ),
        EngineCommand(
            engine="transformers",
            command="from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            f"tokenizer = AutoTokenizer.from_pretrained({draft!r})\n"
            f"model = AutoModelForCausalLM.from_pretrained({model!r})\n"
            f"draft = AutoModelForCausalLM.from_pretrained({draft!r})\n"
            f"draft.generation_config.num_assistant_tokens = {num_speculations}\n"
            'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
            "print(tokenizer.decode(model.generate(**inputs, assistant_model=draft, do_sample=False)[0]))",
        ),
    )
