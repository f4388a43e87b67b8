"""Which base a run's adapters belong to: a digest of the files that hold its weights, kept in the workdir.

The files are digested, not the arrays: so the digest is the same for every dtype, image size, process and device. A
base that was saved again (other shards, another format) counts as another one.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from paligemma_jax.weights.adapters.peft import open_peft
from paligemma_jax.weights.adapters.peft_config import FILE as CONFIG
from paligemma_jax.weights.reader import weight_files
from train_jax.core.errors import UserError
from train_jax.core.files import write_atomically

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
    files = weight_files(path)
    return _digest(files) if files else hashlib.sha256(str(path).encode()).hexdigest()


def adapter_digest(path: str | Path) -> str:
    """As `base_digest`, of the folder of adapters that a run went on from.

    Raises:
      UserError: no adapters there.
    """
    folder = open_peft(path).arrays
    return _digest([folder.path / CONFIG, *folder.files])


def model_digest(path: str | Path) -> str:
    """As `base_digest`, of a model that may be the workdir of a run.

    Raises:
      UserError: no model there.
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
        with open(file, "rb") as stream:
            for start in _starts(size):
                stream.seek(start)
                digest.update(stream.read(PIECE))
    return digest.hexdigest()


def _starts(size: int) -> list[int]:
    if size <= WHOLE:
        return list(range(0, size, PIECE))
    return np.linspace(0, size - PIECE, WHOLE // PIECE).astype(np.int64).tolist()


def write_digest(
    workdir: Path,
    path: str | Path | None,
    adapter: str | Path | None = None,
    vision: str | Path | None = None,
    siglip: str | Path | None = None,
) -> None:
    """Notes in a workdir what its run is made of: base, adapters to go on from, whose tower, whose texts."""
    noted: dict = {} if path is None else {"path": str(path), "sha256": base_digest(path)}
    if adapter is not None:
        noted["adapter"] = {"path": str(adapter), "sha256": adapter_digest(adapter)}
    if vision is not None:
        noted["vision"] = {"path": str(vision), "sha256": model_digest(vision)}
    if siglip is not None:
        noted["siglip"] = {"path": str(siglip), "sha256": model_digest(siglip)}
    # Other processes of a run may be reading it.
    write_atomically(workdir / FILE, json.dumps(noted, indent=2) + "\n")


def check_digest(
    workdir: Path,
    path: str | Path | None,
    adapter: str | Path | None = None,
    vision: str | Path | None = None,
    siglip: str | Path | None = None,
) -> None:
    """Compares a base, adapters, a tower and a SigLIP with those noted in a workdir; passes where none are noted.

    Raises:
      UserError: they are others.
    """
    file = workdir / FILE
    if not file.is_file():
        return
    noted = json.loads(file.read_text(encoding="utf-8"))
    if path is not None and "path" in noted:
        _compare(workdir, "on the base that was", noted, path, base_digest(path), "model.path")
    if adapter is not None and "adapter" in noted:
        _compare(
            workdir, "from the adapters that were", noted["adapter"], adapter, adapter_digest(adapter), "adapter.path"
        )
    if vision is not None and "vision" in noted:
        _compare(workdir, "with the tower that was", noted["vision"], vision, model_digest(vision), "init.vision")
    if siglip is not None and "siglip" in noted:
        _compare(workdir, "on the texts of", noted["siglip"], siglip, model_digest(siglip), "siglip")


def _compare(workdir: Path, what: str, noted: dict, path: str | Path | None, found: str, key: str) -> None:
    if found != noted["sha256"]:
        raise UserError(
            f"{workdir} was trained {what} at {noted['path']} (sha256 {noted['sha256'][:12]}...), found another at "
            f"{path} ({found[:12]}...), expected the same: set {key} to it."
        )
