"""Exports on their way to the hub.

Decides what is known before training of a push at its end, and that a push which fails costs
nothing.
"""

import warnings
from pathlib import Path

from gspo_lightning.checkpoint.quoted import printable


def check_hub_name(name: str) -> None:
    """Raise ValueError for what is no name of a repository."""
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ValueError(f"HFExport.push_to_hub: {_first_line(error)}") from error


def check_hub(name: str) -> None:
    """Refuse a push that is bound to fail, before training.

    Raises:
        ValueError: If there is no token here, or the hub does not take it or cannot be reached.
    """
    from huggingface_hub import HfApi, get_token

    if not get_token():
        raise ValueError(
            f"HFExport.push_to_hub {name!r}: there is no token of the hub on this machine; run "
            "`hf auth login` or set HF_TOKEN, or leave push_to_hub out"
        )
    try:
        HfApi().whoami()
    except Exception as error:  # whatever a network has to say
        raise ValueError(
            f"HFExport.push_to_hub {name!r}: the hub does not take the token, or cannot be reached "
            f"({_first_line(error)}); leave push_to_hub out, and push later with `hf upload {name} "
            "FOLDER`"
        ) from error


def push(folder: Path, name: str, message: str) -> str | None:
    """Push a folder to the hub, where a new repository is private; returns its address.

    A push that fails is said and costs nothing: the folder is whole.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message=message)
    except Exception as error:
        warnings.warn(
            f"HFExport.push_to_hub {name!r} failed ({_first_line(error)}); the model is whole in "
            f"{folder}: push it with `hf upload {name} {folder}`",
            stacklevel=2,
        )
        return None
    return str(address)


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return printable(text.splitlines()[0])
