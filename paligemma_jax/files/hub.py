"""Downloads models from the Hugging Face Hub ("hf://owner/name") and uploads them; needs the extra [hub]."""

import importlib
import re
from pathlib import Path
from types import ModuleType

from train_jax.core.errors import UserError

SCHEME = "hf://"
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DOWNLOADED = ["*.json", "*.safetensors", "*.npz", "tokenizer.model", "spiece.model"]  # no pickles, no code


def is_remote(path: str | Path) -> bool:
    """Returns whether a path names a repository on the Hub."""
    return str(path).startswith(SCHEME)


def download(path: str | Path) -> Path:
    """Returns the local folder of "hf://owner/name" or "hf://owner/name@revision", downloading it if it is not cached.

    Cache folder, token and server are set by huggingface_hub's own variables (HF_HOME, HF_TOKEN, HF_ENDPOINT,
    HF_HUB_OFFLINE).

    Raises:
      UserError: huggingface_hub is not installed, the name is not valid, or the repository cannot be downloaded.
    """
    name, _, revision = str(path).removeprefix(SCHEME).partition("@")
    _check(name, str(path))
    hub = _library()
    try:
        return Path(hub.snapshot_download(name, revision=revision or None, allow_patterns=DOWNLOADED))
    except Exception as error:  # network failures have no common base class
        raise UserError(
            f"{path} cannot be downloaded ({_first_line(error)}): check the name and the connection, and for a gated "
            "model accept its terms and set HF_TOKEN."
        ) from error


def push(path: str | Path, repository: str) -> str:
    """Uploads a folder or a single file to a repository of the Hub, which is created private if it does not exist.

    Returns:
      The repository's address.

    Raises:
      UserError: as `download`.
    """
    name = repository.removeprefix(SCHEME)
    _check(name, repository)
    api, path = _library().HfApi(), Path(path)
    try:
        address = str(api.create_repo(name, private=True, exist_ok=True))
        if path.is_dir():
            api.upload_folder(repo_id=name, folder_path=path)
        else:
            api.upload_file(repo_id=name, path_or_fileobj=path, path_in_repo=path.name)
    except Exception as error:  # as above
        raise UserError(
            f"{path} cannot be pushed to {name} ({_first_line(error)}): check the connection, and set HF_TOKEN to a "
            "token that may write there."
        ) from error
    return address


def _check(name: str, given: str) -> None:
    if not NAME.fullmatch(name) or ".." in name:
        raise UserError(f"{given} is no repository, expected owner/name, as in hf://google/paligemma-3b-pt-224.")


def _library() -> ModuleType:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise UserError(
            "huggingface_hub is not installed: pip install 'paligemma-jax[hub]', or download the files yourself and "
            "give their folder."
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
