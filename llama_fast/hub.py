"""The folder of a checkpoint: one that is there, or a repository of the Hugging Face hub, downloaded."""

import os
from pathlib import Path

from llama_fast.errors import CheckpointPathError, shown

# Configuration, tokenizer, chat template and the weights' index; and the weights.
_SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model"]
_WEIGHT_FILES = ["*.safetensors"]


def find_folder(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    weights: bool = True,
) -> Path:
    """The local folder of a checkpoint; downloads it, with the hub's own progress bars, when it is a hub id.

    Args:
        name_or_path: a folder, or `owner/name` on the Hugging Face hub. An existing folder wins.
        revision: branch, tag or commit, as cache_dir, token and local_files_only as in
            `huggingface_hub.snapshot_download`; unused for a folder. HF_HUB_OFFLINE=1 is as local_files_only.
        weights: False downloads no safetensors: configuration, tokenizer, chat template and the index only.

    Returns:
        The folder. Nothing else of a hub repository is downloaded, and no file of its subfolders.

    Raises:
        CheckpointPathError: no such folder and not a hub id, or the hub has no such repository, revision or connection.
    """
    repo_id = os.fspath(name_or_path)
    path = Path(os.path.expanduser(repo_id))
    if repo_id and os.path.isdir(path):  # unlike Path's, these take any name: too long, ~ of nobody, a NUL
        return path
    if os.path.isfile(path):
        raise CheckpointPathError(f"{path} is a file; give the folder that holds config.json and model.safetensors")
    accepted = "give an existing folder, or a hub id such as meta-llama/Llama-3.2-1B"
    if repo_id.count("/") != 1:
        raise CheckpointPathError(f"no folder '{shown(repo_id)}'; {accepted}")

    # Imported here: a local folder does not need the HTTP client that comes with it.
    # HTTPError is its HTTP client's, whichever that is; it covers connections lost during a download.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
    )

    try:
        folder = snapshot_download(
            repo_id,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            allow_patterns=_SMALL_FILES + _WEIGHT_FILES if weights else _SMALL_FILES,
            # Subfolders and consolidated files hold the same weights in other formats.
            ignore_patterns=["*/*", "consolidated*"],
        )
    except HFValidationError as error:
        raise CheckpointPathError(
            f"no folder '{shown(repo_id)}' and not a hub id ({shown(str(error))}); {accepted}"
        ) from error
    except GatedRepoError as error:
        raise CheckpointPathError(
            f"hub repository {repo_id} is gated: accept its licence at https://huggingface.co/{repo_id}, "
            "then pass token= or run `hf auth login`"
        ) from error
    except LocalEntryNotFoundError as error:
        fix = "connect"
        if local_files_only or constants.HF_HUB_OFFLINE:
            fix = "pass local_files_only=False" if local_files_only else "unset HF_HUB_OFFLINE"
        raise CheckpointPathError(
            f"no folder '{shown(repo_id)}', no complete cached copy of that hub id (revision {revision or 'main'}), "
            f"and the hub was not asked or not reachable; {accepted}, or {fix}"
        ) from error
    except (HTTPError, OSError) as error:
        raise CheckpointPathError(
            f"no folder '{shown(repo_id)}', and downloading hub repository {repo_id} "
            f"(revision {revision or 'main'}) failed: {' '.join(str(error).split())}; {accepted}, or pass token= if it "
            "is private"
        ) from error
    return Path(folder)
