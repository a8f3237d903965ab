"""What a run wrote, on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token

from ..errors import InputError
from ..settings.dreambooth import HubSettings


def check_hub(settings: HubSettings) -> None:
    """Raises InputError if there is no token to push with."""
    if settings.push_to_hub and not (settings.hub_token or get_token()):
        raise InputError("--push_to_hub needs a token: log in by `hf auth login`, or set HF_TOKEN")


def open_repository(settings: HubSettings, output_dir: str | Path) -> str:
    """Makes the repository unless it is there, before time is spent on training; returns its full name.

    Raises:
        InputError: if that fails, as without permission.
    """
    name = settings.hub_model_id or Path(output_dir).resolve().name
    try:
        return HfApi(token=settings.hub_token).create_repo(name, exist_ok=True).repo_id
    except Exception as error:  # of the network library that this huggingface_hub happens to use, too
        raise InputError(f"--push_to_hub: the repository {name} cannot be made or reached: {error}") from error


def push(settings: HubSettings, repository: str, folder: Path, logging_dir: str, steps: int) -> str:
    """Uploads what the run wrote, and nothing else that may lie in the output folder; returns the commit's address.

    Args:
        settings: with the token.
        repository: of [`open_repository`].
        folder: the output folder.
        logging_dir: of the log, in that folder or absolute.
        steps: that the run took.

    Raises:
        RuntimeError: if that fails, with the command that does it later. The files stay where they are.
    """
    try:
        commit = HfApi(token=settings.hub_token).upload_folder(
            repo_id=repository,
            folder_path=str(folder),
            commit_message=f"Train for {steps} steps",
            allow_patterns=uploaded_patterns(logging_dir),
            ignore_patterns=["checkpoint-*", ".*", "*/.*"],
        )
    except Exception as error:
        raise RuntimeError(
            f"the run is complete and in {folder}, but could not be pushed: {error}\nTry again by\n"
            f"  hf upload {repository} {folder} --exclude 'checkpoint-*'"
        ) from error
    return commit.commit_url


def uploaded_patterns(logging_dir: str) -> list[str]:
    """Of the files in the output folder."""
    logs = [] if Path(logging_dir).is_absolute() else [f"{Path(logging_dir).as_posix()}/*"]
    return ["*.safetensors", "adapter_config.json", "README.md", "config.yaml", "validation/*", *logs]
