"""Small files of a run, written so that a reader never meets half of one."""

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
    """Where prepared data and digests go: $XDG_CACHE_HOME/paligemma_jax, by default ~/.cache/paligemma_jax."""
    return str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "paligemma_jax")


def make_folder(path: str | Path) -> Path:
    """Makes a folder to write to, with its parents.

    Raises:
      UserError: it cannot be made, or not be written to.
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
    """Yields a path to write a file or a folder at, which is renamed to `path` when the block ends.

    Readers see the old content or the new, never a part; a block that raises leaves `path` as it was. The draft lies
    beside `path`, whose parents are made, under a name of its own, so that several processes may write at once.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        draft = Path(scratch) / path.name
        yield draft
        draft.replace(path)


def write_atomically(path: str | Path, text: str) -> None:
    """Writes UTF-8 text by `atomic`; even after a power cut `path` holds the old text or the new, whole."""
    with atomic(path) as draft, draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no file."""
    path = Path(path)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text of nested dicts, lists, scalars and arrays (Python's, numpy's or on a device).

    NaN and infinities, for which JSON has no words, become null.
    """
    return json.dumps(plain(value), indent=indent, allow_nan=False, ensure_ascii=False)


def plain(value: Any) -> Any:
    """The same value in JSON's own types: str keys, lists, Python scalars, None for a non-finite number."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars, numpy arrays and device arrays
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one level of "/"-joined names: `{"a": {"b": 1}}` becomes `{"a/b": 1}`."""
    flat = {}
    for name, value in tree.items():
        path = f"{prefix}/{name}" if prefix else str(name)
        flat |= flatten(value, path) if isinstance(value, Mapping) else {path: value}
    return flat
