"""`rapm export --push_to_hub`: a run's files as a model on the Hugging Face Hub, through huggingface_hub.

The token, HF_ENDPOINT and HF_HUB_OFFLINE are huggingface_hub's own affair.
"""

from __future__ import annotations

from pathlib import Path

from rapm.errors import ExportError, UserError
from rapm.export.card import CARD
from rapm.export.clients import WORKFLOW
from rapm.export.files import FILES

# What is shared of a run: neither its settings, which name local paths, nor the trajectories.
SHARED = (CARD, *FILES, WORKFLOW, "samples.png")


def claim_repo(name: str) -> str:
    """Makes the model repository `name` (owner/name, or name alone for the token's owner) if need be; its full id.

    A new one is private: to publish is a click in its settings, to take back what was public is not possible.
    UserError without a token, a connection, or the right to write there.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UserError("push_to_hub: no token for the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN")
    try:
        return str(HfApi().create_repo(name, private=True, exist_ok=True).repo_id)
    except _failures() as error:
        raise UserError(f"push_to_hub: cannot make or open the model {name} on the hub ({_line(error)})") from error


def upload(folder: Path, repo: str) -> str:
    """Uploads `SHARED` in one commit; the model's address. ExportError if that fails: the files stay where they are."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=list(SHARED), commit_message="rapm export")
    except _failures() as error:
        raise ExportError(
            f"the upload to {repo} failed ({_line(error)}); the files are in {folder}: the same command tries again"
        ) from error
    return f"{api.endpoint}/{repo}"


def _failures() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises for a wrong name, a refusal or a lost connection, before and since its version 1."""
    from httpx import HTTPError

    return OSError, ValueError, HTTPError


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
