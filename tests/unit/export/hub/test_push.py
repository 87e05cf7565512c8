"""Folders become repositories on a small hub on this machine, with cards of what was measured."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from adapters import write_tiny_adapters
from stub_hub import Hub, Repository, User, serve

from layerskip.cli.main import main
from layerskip.errors import InvalidArgumentError
from layerskip.export.hub.push import plan_push

Tiny = Callable[..., Path]
TOKEN = "hf_writes"
SPEED = {"exit_layer": 2, "num_speculations": 3, "tokens_per_second": 50.0, "speedup": 1.5, "agreement": {"2": 0.8}}

# Runs each `[repo, folder]` as `layerskip export push`, and prints what came of them.
PUSH = """
import contextlib, io, json, sys
from layerskip.cli.main import main
results = []
for repo, folder in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["export", "push", "--folder", folder, "--repo", repo, "--json", *EXTRA])
    results.append({"code": code, "out": out.getvalue(), "err": err.getvalue()})
print(json.dumps(results))
"""
LOAD = """
import json, sys
import layerskip
lm = [layerskip.load(name, dtype="float32", device="cpu") for name, _ in json.loads(sys.argv[1])]
print(json.dumps([{"exits": each.decoder.adapted_exits, "logits": each.logits([1, 2, 3]).tolist()} for each in lm]))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve({"owner/broken": Repository({"a" * 40: {}}, {"main": "a" * 40}, broken=400)}) as found:
        found.owners[TOKEN] = "owner"
        yield found


@pytest.fixture
def user(hub: Hub, tmp_path: Path) -> User:
    return User(tmp_path / "home", hub.url)


@pytest.fixture
def model(tiny_checkpoint: Tiny) -> Path:
    return tiny_checkpoint(tokenizer=True)


def push(user: User, *calls: tuple[str, Path], extra: tuple[str, ...] = (), **env: str) -> list[dict[str, Any]]:
    script = f"EXTRA = {list(extra)!r}\n{PUSH}"
    return user.run(script, *((repo, str(folder)) for repo, folder in calls), HF_HUB_DISABLE_XET="1", **env)


def test_a_pushed_model_is_loaded_by_its_id(hub: Hub, user: User, model: Path) -> None:
    import layerskip

    write_tiny_adapters(model, model, [2])
    (outcome,) = push(user, ("owner/new", model), extra=("--private",), HF_TOKEN=TOKEN)
    assert outcome["code"] == 0, outcome["err"]
    result = json.loads(outcome["out"])
    repository = hub.repositories["owner/new"]
    files = repository.commits[repository.revisions["main"]]
    assert set(files) == set(result["files"])
    assert repository.private
    assert result["url"].startswith(f"{hub.url}/owner/new/commit/")
    assert files["model.safetensors"] == (model / "model.safetensors").read_bytes()
    assert files["README.md"].decode() == result["card"]
    (loaded,) = user.run(LOAD, ("owner/new", None), HF_TOKEN=TOKEN)
    lm = layerskip.load(str(model), dtype="float32", device="cpu")
    assert loaded == {"exits": [2], "logits": lm.logits([1, 2, 3]).tolist()}


def test_a_second_push_replaces_files_in_one_commit(hub: Hub, user: User, model: Path) -> None:
    push(user, ("owner/new", model), HF_TOKEN=TOKEN)
    (model / "layerskip.json").write_text(json.dumps(SPEED))
    push(user, ("owner/new", model), HF_TOKEN=TOKEN)
    repository = hub.repositories["owner/new"]
    assert len(repository.commits) == 3  # none, the first, the second
    assert b"Recommended settings" in repository.commits[repository.revisions["main"]]["README.md"]


def test_without_a_token_nothing_is_sent(hub: Hub, user: User, model: Path) -> None:
    (outcome,) = push(user, ("owner/new", model))
    assert outcome["code"] == 2
    assert "hf auth login" in outcome["err"]
    assert outcome["err"].count("\n") == 1
    assert hub.requests == []


@pytest.mark.parametrize(
    ("repo", "message"), [("other/name", "doesn't let this token write"), ("owner/broken", "failed")]
)
def test_what_the_hub_refuses(repo: str, message: str, hub: Hub, user: User, model: Path) -> None:
    (outcome,) = push(user, (repo, model), HF_TOKEN=TOKEN)
    assert outcome["code"] == 2
    assert re.search(message, outcome["err"])
    assert outcome["err"].count("\n") == 1


def test_a_dry_run_shows_the_card_and_needs_no_token(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "push", "--folder", str(model), "--repo", "owner/new", "--dry-run"]) == 0
    out = capfd.readouterr().out
    assert "would be uploaded to owner/new: README.md, config.json" in out
    assert "layerskip generate --model owner/new" in out


def test_what_was_not_measured_is_not_in_the_card(model: Path) -> None:
    card = plan_push(model, "owner/new").card
    assert [line for line in card.splitlines() if line.startswith("## ")] == ["## Use"]


def test_the_card_has_what_was_measured(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "layerskip": {"exit_loss": "kl", "exit_layers": [2, 3]}}))
    (tmp_path / "best.json").write_text(json.dumps({**SPEED, "source": {"dataset": "gsm8k", "cpu": "AMD EPYC"}}))
    card = plan_push(model, "owner/new", [tmp_path / "best.json"]).card
    assert "| 2 | 80.0% |" in card
    assert "Exit layer 2 with 3 drafts: 50.0 tokens/s, 1.50 times autoregressive decoding (gsm8k, AMD EPYC)" in card
    assert "| exit layers | 2, 3 |" in card
    assert "--exit-layer 2 --num-speculations 3" in card


def test_the_folder_s_own_page_and_metadata_stay(model: Path) -> None:
    (model / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- code\n---\n# My model\nText.\n")
    card = plan_push(model, "owner/new").card
    assert "license: apache-2.0" in card
    assert "null" not in card
    assert "- code\n- layerskip" in card
    assert "# My model\nText.\n\n## Use" in card


def test_what_lies_beside_a_model_is_not_uploaded(model: Path) -> None:
    for name in (
        "log.jsonl",
        "training.json.bak",
        ".lock",
        "checkpoint-10/model.safetensors",
        "notes.txt",
        "sub/a.gguf",
    ):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("{}")
    files = plan_push(model, "owner/new").files
    assert set(files) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_adapters_alone_name_their_base(model: Path, tmp_path: Path) -> None:
    write_tiny_adapters(tmp_path / "adapters", model, [2])
    plan = plan_push(tmp_path / "adapters", "owner/adapters")
    assert "Exit adapters for tiny" in plan.card
    assert "--model tiny --exit-adapters adapters" in plan.card
    assert set(plan.files) == {"README.md", "exit_adapters.json", "exit_adapters.safetensors"}


@pytest.mark.parametrize("repo", ["name", "a/b/c", "a b/c", ""])
def test_wrong_names_are_refused(repo: str, model: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"is not a repository.*give owner/name"):
        plan_push(model, repo)


def test_folders_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="no model to upload"):
        plan_push(tmp_path, "owner/name")
    with pytest.raises(InvalidArgumentError, match="there is no folder"):
        plan_push(tmp_path / "nothing", "owner/name")
