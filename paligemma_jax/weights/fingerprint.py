"""Digests of a base's weight files, kept in the workdir to identify the base that a run's adapters belong to.

Files are digested, not arrays, so the digest is the same for every dtype, image size, process and device. A base that
was saved again (in other shards or another format) has another digest.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from paligemma_jax.weights.adapters.peft import open_peft
from paligemma_jax.weights.adapters.peft_config import FILE as CONFIG
from paligemma_jax.weights.reader import weight_files
from train_jax.core.errors import UserError
from train_jax.core.files import write_atomically

FILE = "base.json"
WHOLE = 64 << 20  # bytes: files up to this size are read whole, larger ones in evenly spaced pieces of this total size
PIECE = 64 << 10


def base_digest(path: str | Path) -> str:
    """Returns the SHA-256 of a base's weight files, 64 hexadecimal digits; of the name for "random:...".

    Of a file above 64 MiB, its size and 1024 pieces of 64 KiB are digested, the first and the last among them: training
    changes every array, and almost every part of it.

    Raises:
      UserError: no model at `path`.
    """
    files = weight_files(path)
    return _digest(files) if files else hashlib.sha256(str(path).encode()).hexdigest()


def adapter_digest(path: str | Path) -> str:
    """Returns the digest of the adapters that a run continued from; see `base_digest`.

    Raises:
      UserError: no adapters at `path`.
    """
    folder = open_peft(path).arrays
    return _digest([folder.path / CONFIG, *folder.files])


def model_digest(path: str | Path) -> str:
    """Returns the digest of a model that may be the workdir of a run; see `base_digest`.

    Raises:
      UserError: no model at `path`.
    """
    checkpoints = Path(path).expanduser() / "checkpoints"
    if not checkpoints.is_dir():
        return base_digest(path)
    return _digest(sorted(file for file in checkpoints.rglob("*") if file.is_file()))


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{size} bytes\n".encode())
        with file.open("rb") as stream:
            for start in _starts(size):
                stream.seek(start)
                digest.update(stream.read(PIECE))
    return digest.hexdigest()


def _starts(size: int) -> list[int]:
    if size <= WHOLE:
        return list(range(0, size, PIECE))
    return np.linspace(0, size - PIECE, WHOLE // PIECE).astype(np.int64).tolist()


class _Input(NamedTuple):
    """What a run can start from: how an error relates the run to it, its config key, and its digest."""

    relation: str
    key: str
    digest: Callable[[str | Path], str]


_INPUTS = {
    "path": _Input("on the base that was", "model.path", base_digest),
    "adapter": _Input("from the adapters that were", "adapter.path", adapter_digest),
    "vision": _Input("with the tower that was", "init.vision", model_digest),
    "siglip": _Input("on the texts of", "siglip", model_digest),
}
"""By the argument of `write_digest` and `check_digest`."""


def write_digest(
    workdir: Path,
    path: str | Path | None = None,
    adapter: str | Path | None = None,
    vision: str | Path | None = None,
    siglip: str | Path | None = None,
) -> None:
    """Writes the digests of a run's inputs into its workdir: base, adapters, vision tower, and SigLIP for texts."""
    inputs = {"path": path, "adapter": adapter, "vision": vision, "siglip": siglip}
    entries = {
        name: {"path": str(source), "sha256": _INPUTS[name].digest(source)}
        for name, source in inputs.items()
        if source is not None
    }
    contents = entries.pop("path", {}) | entries  # the base's entry is the file's top level
    # Other processes of a run may be reading it.
    write_atomically(workdir / FILE, json.dumps(contents, indent=2) + "\n")


def check_digest(
    workdir: Path,
    path: str | Path | None = None,
    adapter: str | Path | None = None,
    vision: str | Path | None = None,
    siglip: str | Path | None = None,
) -> None:
    """Compares a base, adapters, a tower and a SigLIP with the digests in a workdir, as far as it has these.

    Raises:
      UserError: one of them has changed.
    """
    file = workdir / FILE
    if not file.is_file():
        return
    contents = json.loads(file.read_text(encoding="utf-8"))
    for name, source in {"path": path, "adapter": adapter, "vision": vision, "siglip": siglip}.items():
        if source is None or name not in contents:
            continue
        relation, key, digest_of = _INPUTS[name]
        recorded, digest = contents if name == "path" else contents[name], digest_of(source)
        if digest != recorded["sha256"]:
            raise UserError(
                f"{workdir} was trained {relation} at {recorded['path']} (sha256 {recorded['sha256'][:12]}...), found "
                f"another at {source} ({digest[:12]}...), expected the same: set {key} to it."
            )
