"""Writes files and folders through drafts, so that no partly written one is seen, and converts values to JSON."""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from train_jax.core.errors import UserError


def cache_dir() -> str:
    """Returns the folder of prepared data and digests: $XDG_CACHE_HOME/paligemma_jax, by default in ~/.cache."""
    return str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "paligemma_jax")


def make_folder(path: str | Path) -> Path:
    """Creates a folder and its parents, if missing, and returns its path.

    Raises:
      UserError: the folder cannot be created or is not writable.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be made ({error.strerror}), expected a folder: choose another.") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"{path} may not be written to, expected a folder of your own: choose another.")
    return path


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yields a path at which to write a file or folder, and renames it to `path` when the block ends.

    Readers see either the old or the new content in full; if the block raises, `path` is unchanged. The temporary
    folder is unique and in the parent of `path`, which is created, so that several processes may write at once.
    """
    path = Path(path)
    with _scratch(path.parent, path.name) as scratch:
        draft = scratch / path.name
        yield draft
        draft.replace(path)


@contextlib.contextmanager
def replacing(folder: str | Path, stale: str) -> Iterator[Path]:
    """Yields an empty folder for new files, and moves them into `folder` when the block ends.

    Before they are moved, files of `folder` that match the glob pattern `stale` are removed; others stay, unless a new
    file has their name. If the block raises, `folder` is unchanged, but created if missing.
    """
    folder = Path(folder)
    with _scratch(folder, folder.name) as draft:
        yield draft
        for file in folder.glob(stale):
            file.unlink()
        for file in sorted(draft.iterdir()):
            file.replace(folder / file.name)


@contextlib.contextmanager
def _scratch(folder: Path, name: str) -> Iterator[Path]:
    """Yields a hidden folder in `folder`, which is created if missing; it is removed when the block ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}-") as scratch:
        yield Path(scratch)


def write_atomically(path: str | Path, text: str) -> None:
    """Writes UTF-8 text by `atomic` and syncs it to disk, so that `path` is complete even after a power failure."""
    with atomic(path) as draft, draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_json_or_empty(path: str | Path) -> dict[str, Any]:
    """Returns the object in a JSON file, or an empty dict if there is no file.

    Raises:
      UserError: the file holds something else.
    """
    path = Path(path)
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        raise UserError(f"{path} is not valid JSON ({error}): restore the file, or remove it") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, expected an object: restore the file, or remove it")
    return value


def to_json(value: Any, indent: int | None = None) -> str:
    """Returns nested dicts, lists, scalars and arrays (of Python, NumPy or JAX) as JSON text.

    NaN and infinities, which JSON cannot represent, become null.
    """
    return json.dumps(plain(value), indent=indent, allow_nan=False, ensure_ascii=False)


def plain(value: Any) -> Any:
    """Returns a value in the types of JSON: str keys, lists, Python scalars, and None for a non-finite number."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy scalars, NumPy arrays and JAX arrays
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested dicts as one dict with names joined by "/": `{"a": {"b": 1}}` becomes `{"a/b": 1}`."""
    flat = {}
    for name, value in tree.items():
        path = f"{prefix}/{name}" if prefix else str(name)
        flat |= flatten(value, path) if isinstance(value, Mapping) else {path: value}
    return flat
