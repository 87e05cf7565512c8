"""Downloads from the Hugging Face hub, with the errors a newcomer needs."""

from pathlib import Path

from layerskip.errors import CheckpointError, CheckpointNotFoundError, GatedRepositoryError

TOKENIZER_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)
"""Files of a tokenizer, its chat template included."""
# Exactly what is loaded: repositories often carry the same weights a second time in another format.
PATTERNS = [
    "config.json",
    "generation_config.json",
    "layerskip.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "exit_adapters.json",
    "exit_adapters.safetensors",
    *TOKENIZER_PATTERNS,
]


def download(repo_id: str, revision: str | None = None) -> Path:
    """Folder of a hub repository in the local cache, fetching what isn't there yet.

    The cache, `HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` are huggingface_hub's.

    Args:
        repo_id: `owner/name`.
        revision: Branch, tag or commit; the main branch if not given.

    Raises:
        GatedRepositoryError: Access has to be requested first.
        CheckpointNotFoundError: No such repository or revision, or the hub can't be reached and it isn't cached.
        CheckpointError: The id is malformed, or the download failed.
    """
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=PATTERNS))
    except hub.GatedRepoError as error:
        raise GatedRepositoryError(_gated(repo_id)) from error
    except hub.RevisionNotFoundError as error:
        raise CheckpointNotFoundError(f"{repo_id} has no revision {revision!r}; see its branches and tags") from error
    except hub.RepositoryNotFoundError as error:
        raise CheckpointNotFoundError(
            f"the hub has no repository {repo_id!r} that you can see; check the spelling, and if it is private, "
            "log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except hub.HFValidationError as error:
        raise CheckpointError(f"{repo_id!r} is not a hub id: {error}") from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        if isinstance(error.__cause__, hub.HfHubHTTPError):
            raise CheckpointError(
                f"{repo_id} is not in the local cache, and the hub said: {error.__cause__}"
            ) from error
        raise CheckpointNotFoundError(
            f"{repo_id} is not in the local cache and the hub can't be reached; go online once (and unset "
            "HF_HUB_OFFLINE), or give a local folder"
        ) from error
    except Exception as error:  # also those of the HTTP library below, which one depends on huggingface_hub's version
        raise CheckpointError(f"downloading {repo_id} failed; try again later: {error}") from error


def _gated(repo_id: str) -> str:
    return (
        f"{repo_id} is gated and your account has no access yet. "
        f"1. Request access at https://huggingface.co/{repo_id} (log in, accept the terms, wait for the approval). "
        "2. Make a read token at https://huggingface.co/settings/tokens. "
        "3. Run `hf auth login` and paste it, or set HF_TOKEN to it."
    )
