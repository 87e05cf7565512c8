"""What a folder holds and how it is named: used where it can be, and said where it can't."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import layerskip
from layerskip.checkpoint.checkpoint import open_checkpoint
from layerskip.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    InvalidArgumentError,
    LayerSkipError,
    WeightsError,
)

Tiny = Callable[..., Path]
TOKENS = [5, 3, 80, 41]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def load(folder: Path, **options: Any) -> layerskip.LanguageModel:
    return layerskip.load(str(folder), dtype="float32", device="cpu", **options)


def change(folder: Path, file: str, **keys: Any) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **keys}))


# A head of its own under tie_word_embeddings


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_head_of_its_own_is_used_whatever_the_flag_says(
    tiny_checkpoint: Tiny, tmp_path: Path, kernels: Any, sharded: bool
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint(max_shard_size="20KB" if sharded else None), folder)
    untied = load(folder, kernels=kernels).logits(TOKENS)
    parameters = open_checkpoint(str(folder)).num_parameters
    change(folder, "config.json", tie_word_embeddings=True)
    lm = load(folder, kernels=kernels)
    assert torch.equal(lm.logits(TOKENS), untied)
    assert not lm.config.tie_word_embeddings
    assert lm.checkpoint.num_parameters == parameters
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(untied, theirs, rtol=0, atol=1e-4)


def test_drafts_use_that_head_too(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint(), tmp_path, dirs_exist_ok=True)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "exit_layer": 2, "num_speculations": 3}
    before = load(tmp_path, draft_vocabulary=96).generate([TOKENS], **options)[0]
    change(tmp_path, "config.json", tie_word_embeddings=True)
    after = load(tmp_path, draft_vocabulary=96).generate([TOKENS], **options)[0]
    assert (after.token_ids, after.stats.accepted) == (before.token_ids, before.stats.accepted)


def test_a_head_that_is_the_embedding_is_tied(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint(tie_word_embeddings=True), tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tied = load(tmp_path)
    save_file({**tensors, HEAD: tensors[EMBEDDING].clone()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    lm = load(tmp_path)
    assert lm.config.tie_word_embeddings
    assert lm.checkpoint.num_parameters == tied.checkpoint.num_parameters
    assert torch.equal(lm.logits(TOKENS), tied.logits(TOKENS))


# End tokens


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("end", [-1, 10**9, [3, 96], [-5]])
def test_end_tokens_outside_the_vocabulary(tiny_checkpoint: Tiny, tmp_path: Path, file: str, end: Any) -> None:
    shutil.copytree(tiny_checkpoint(), tmp_path, dirs_exist_ok=True)
    change(tmp_path, file, eos_token_id=end)
    with pytest.raises(CheckpointError, match=rf"^{file} of .* names the end token .*0 to 95"):
        load(tmp_path).generate([TOKENS], max_new_tokens=2)


# Index entries


@pytest.mark.parametrize("entry", ["/etc/passwd", "../other/model.safetensors", "a/../../x", "C:\\x", "..\\x"])
def test_an_index_that_leads_out_of_the_folder(tiny_checkpoint: Tiny, tmp_path: Path, entry: str) -> None:
    shutil.copytree(tiny_checkpoint(), tmp_path / "model")
    shutil.copytree(tiny_checkpoint(), tmp_path / "other")
    names = list(load_file(tmp_path / "model" / "model.safetensors"))
    (tmp_path / "model" / "model.safetensors").unlink()
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, entry)}))
    with pytest.raises(WeightsError, match="isn't in its folder"):
        load(tmp_path / "model")


def test_links_of_the_hub_s_cache_are_followed(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    shards = tiny_checkpoint(max_shard_size="40KB")
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(shards.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    assert torch.equal(load(snapshot).logits(TOKENS), load(shards).logits(TOKENS))


# Other things than checkpoints


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "holds an adapter only.*merge_and_unload"),
        (["model.fp16.safetensors"], "there is 'model.fp16.safetensors': only model.safetensors.*rename it"),
        (["consolidated.safetensors", "params.json"], "there is 'consolidated.safetensors'"),
        (["pytorch_model.bin"], "there is 'pytorch_model.bin': pickled weights can run code.*convert it"),
        (["flax_model.msgpack"], "there is 'flax_model.msgpack': these are weights of another framework"),
        ([], "has no weights: neither model.safetensors nor model.safetensors.index.json$"),
    ],
)
@pytest.mark.parametrize("has_config", [True, False])
def test_what_a_folder_has_instead(
    tiny_checkpoint: Tiny, tmp_path: Path, files: list[str], said: str, has_config: bool
) -> None:
    if has_config:
        shutil.copy(tiny_checkpoint() / "config.json", tmp_path)
    for file in files:
        (tmp_path / file).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=said if has_config or files else "has no config.json$"):
        load(tmp_path)


# Names and options of load


@pytest.mark.parametrize("name", [5, None, b"demo", ["demo"]])
def test_names_that_are_no_texts(name: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="a model is named by a text, got"):
        layerskip.load(name)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "~nobody-by-that-name/model"])
def test_names_that_can_be_no_paths(name: str) -> None:
    with pytest.raises(CheckpointNotFoundError) as error:
        layerskip.load(name)
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)


def test_a_path_is_a_name(tiny_checkpoint: Tiny) -> None:
    assert layerskip.load(tiny_checkpoint(), device="cpu").config.num_layers == 4  # type: ignore[arg-type]


def test_options_that_are_not_known() -> None:
    with pytest.raises(InvalidArgumentError, match=r"unknown option 'nope'; known: revision, dtype, .*compile"):
        layerskip.load("demo", nope=1)
    for options in ({"dtype": 5}, {"device": None}, {"quantize": True}, {"max_context": 1.5}, {"draft_text": 3}):
        with pytest.raises(InvalidArgumentError, match=next(iter(options))):
            layerskip.load("demo", **options)  # type: ignore[arg-type]


def test_numbers_of_numpy(tiny_checkpoint: Tiny) -> None:
    lm = load(tiny_checkpoint(), max_context=np.int64(64))
    options = {"exit_layer": np.int32(2), "num_speculations": np.int64(3), "max_new_tokens": np.uint8(4)}
    result = lm.generate([TOKENS], temperature=np.float32(0.5), seed=np.int64(1), **options)[0]
    assert result.token_ids == lm.generate(
        [TOKENS], temperature=0.5, seed=1, exit_layer=2, num_speculations=3, max_new_tokens=4
    )[0].token_ids  # fmt: skip
    assert lm.score([TOKENS], exit_layer=np.int64(2))[0].logprob == lm.score([TOKENS], exit_layer=2)[0].logprob


# Sizes beyond all measure, and files nested without end


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "layerskip.json", "tokenizer_config.json"])
def test_files_nested_without_end(tiny_checkpoint: Tiny, tmp_path: Path, file: str) -> None:
    shutil.copytree(tiny_checkpoint(tokenizer=True), tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(LayerSkipError) as error:
        load(tmp_path).generate(["a"], max_new_tokens=1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keys", [{"num_hidden_layers": 5000}, {"max_position_embeddings": 2**31 - 1}])
def test_sizes_that_no_file_or_memory_has(tiny_checkpoint: Tiny, tmp_path: Path, keys: dict[str, int]) -> None:
    shutil.copytree(tiny_checkpoint(), tmp_path, dirs_exist_ok=True)
    change(tmp_path, "config.json", **keys)
    with pytest.raises(LayerSkipError, match=r"too few for the 5000 layers|GiB"):
        load(tmp_path)


# Flags of Meta's scripts


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--sample False", "--no-sample"),
        ("--sample=True --top_k 5", "--sample --top_k 5"),
        ("--do_sample false", "--no-sample"),
        ("--sample --temperature 1", "--sample --temperature 1"),
        ("--max_steps 12 --exit_layer -1 --num_speculations=-1", "--max-new-tokens 12"),
        ("--exit_layer 4 --num-speculations 6", "--exit_layer 4 --num-speculations 6"),
    ],
)
def test_flags_of_meta_s_scripts(argv: str, expected: str) -> None:
    from layerskip.cli.flags.arguments import in_our_terms

    assert in_our_terms(argv.split()) == expected.split()


def test_verbose_names_keys_of_other_programs(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint(tokenizer=True), tmp_path, dirs_exist_ok=True)
    change(tmp_path, "config.json", my_tool_version="1.2")
    command = [sys.executable, "-m", "layerskip", "generate", "--model", str(tmp_path), "--prompt", "a"]
    told, quiet = (
        subprocess.run([*command, "--max-new-tokens", "1", *more], capture_output=True, text=True, check=True)
        for more in (["--verbose"], [])
    )
    assert "my_tool_version" in told.stderr
    assert quiet.stderr == ""
