"""A folder as a repository on the Hugging Face hub, with a model card of measured results."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from layerskip.checkpoint.hub import PATTERNS
from layerskip.errors import CheckpointError, InvalidArgumentError, brief
from layerskip.export.hub.card import make_card
from layerskip.export.hub.results import Measured, read_folder, read_results

CARD = "README.md"
UPLOADED = (
    *PATTERNS,
    "*.gguf",
    "*.layerskip.json",
    "*.exit-adapters/*",
    "additional_chat_templates/*",
    "tekken.json",
    "training.toml",
    "agreement.png",
    "LICENSE*",
    "NOTICE*",
)
"""Files that belong to a model: not the checkpoints and logs of a training run that may lie beside them."""
ENOUGH = ("model.safetensors", "model.safetensors.index.json", "*.gguf", "exit_adapters.json")
"""Of these, a folder must have one."""


@dataclass(frozen=True, kw_only=True)
class Push:
    """An upload, done or planned."""

    repo: str
    files: tuple[str, ...]
    """All that are uploaded, the card included."""
    num_bytes: int
    card: str
    private: bool
    url: str | None = None
    """Of the commit; None where nothing was uploaded."""


def plan_push(folder: Path, repo: str, results: Sequence[Path] = (), *, private: bool = False) -> Push:
    """What would be uploaded, without a connection.

    Args:
        folder: A model in Hugging Face's format, exit adapters, or GGUF files.
        repo: `owner/name`.
        results: Files and folders of measurements, besides those in the folder.
        private: Whether a repository that doesn't exist yet becomes a private one.

    Raises:
        InvalidArgumentError: The folder has no model, the repository's name isn't one, or results aren't understood.
        CheckpointError: A file is damaged.
    """
    _check_repo(repo)
    folder = folder.expanduser()
    if not folder.is_dir():
        raise InvalidArgumentError(f"there is no folder {folder}; name the one to upload")
    if not any(any(folder.glob(pattern)) for pattern in ENOUGH):
        raise InvalidArgumentError(
            f"{folder} has neither model.safetensors, a GGUF file nor exit_adapters.json; there is no model to upload"
        )
    files = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and _is_uploaded(path.relative_to(folder).as_posix())
    )
    measured: Measured = sum((read_results(path) for path in results), read_folder(folder))
    card = make_card(folder, repo, measured)
    return Push(
        repo=repo,
        files=(CARD, *files),
        num_bytes=sum((folder / name).stat().st_size for name in files) + len(card.encode()),
        card=card,
        private=private,
    )


def push(folder: Path, plan: Push) -> Push:
    """Upload what is planned, in one commit; the repository is made if there is none.

    Raises:
        InvalidArgumentError: There is no token, or it doesn't allow the upload.
        CheckpointError: The hub can't be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_token()
    operations: list[Any] = [CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=plan.card.encode())]
    operations += [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder.expanduser() / name)
        for name in plan.files
        if name != CARD
    ]
    api = HfApi()
    try:
        api.create_repo(plan.repo, private=plan.private or None, exist_ok=True)
        commit = api.create_commit(plan.repo, operations, commit_message="Upload by layerskip")
    except Exception as error:  # of the library, and of the HTTP library below it
        raise _explain(plan.repo, error) from error
    return Push(
        repo=plan.repo,
        files=plan.files,
        num_bytes=plan.num_bytes,
        card=plan.card,
        private=plan.private,
        url=str(commit.commit_url),
    )


def check_token() -> None:
    """Raise `InvalidArgumentError` if there is no token to upload with."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise InvalidArgumentError(
            "uploading needs a token of the Hugging Face hub: run `hf auth login`, or set HF_TOKEN to a token that may "
            "write (https://huggingface.co/settings/tokens)"
        )


def _is_uploaded(name: str) -> bool:
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in UPLOADED)


def _check_repo(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        raise InvalidArgumentError(f"{repo!r} is not a repository: {brief(error)}; give owner/name") from error


def _explain(repo: str, error: Exception) -> CheckpointError | InvalidArgumentError:
    from huggingface_hub.errors import HfHubHTTPError

    status = getattr(error.response, "status_code", None) if isinstance(error, HfHubHTTPError) else None
    if status in (401, 403):
        return InvalidArgumentError(
            f"the hub doesn't let this token write to {repo} ({status}); log in as its owner with `hf auth login`, "
            "with a token that may write"
        )
    return CheckpointError(f"uploading to {repo} failed, and nothing of it is visible there: {brief(error)}")
