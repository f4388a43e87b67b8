"""Which base a run's adapters belong to: a digest of the files that hold its weights, kept in the workdir.

The files are digested, not the arrays: so the digest is the same for every dtype, image size, process and device. A
base that was saved again (other shards, another format) counts as another one.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from paligemma_jax.weights.load import weight_files
from train_jax.errors import UserError

FILE = "base.json"
WHOLE = 64 << 20  # bytes: a file up to this size is read whole, of a larger one as much, in pieces at even distances
PIECE = 64 << 10


def base_digest(path: str | Path) -> str:
    """SHA-256 of a base's weight files, in 64 hexadecimal digits; of "random:..." that of the name.

    Of a file above 64 MiB its size and 1024 pieces of 64 KiB count, the first and the last among them: training
    changes every array, and what it changes is everywhere.

    Raises:
      UserError: no model there.
    """
    digest = hashlib.sha256()
    files = weight_files(path)
    if not files:
        digest.update(str(path).encode())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{size} bytes\n".encode())
        with open(file, "rb") as stream:
            for start in _starts(size):
                stream.seek(start)
                digest.update(stream.read(PIECE))
    return digest.hexdigest()


def _starts(size: int) -> list[int]:
    if size <= WHOLE:
        return list(range(0, size, PIECE))
    return np.linspace(0, size - PIECE, WHOLE // PIECE).astype(np.int64).tolist()


def write_digest(workdir: Path, path: str | Path) -> None:
    """Notes in a workdir which base its run is made on."""
    (workdir / FILE).write_text(json.dumps({"path": str(path), "sha256": base_digest(path)}, indent=2) + "\n")


def check_digest(workdir: Path, path: str | Path | None) -> None:
    """Compares a base with the one noted in a workdir; passes where none is noted.

    Raises:
      UserError: it is another.
    """
    file = workdir / FILE
    if not file.is_file():
        return
    noted = json.loads(file.read_text(encoding="utf-8"))
    found = base_digest(path)
    if found != noted["sha256"]:
        raise UserError(
            f"{workdir} was trained on the base that was at {noted['path']} (sha256 {noted['sha256'][:12]}...), found "
            f"another at {path} ({found[:12]}...), expected the same: set model.path to it."
        )
