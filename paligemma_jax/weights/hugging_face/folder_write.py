"""Writes a Hugging Face folder: config.json, and safetensors in one file or in shards with an index."""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

SHARD_SIZE = 5 * 10**9  # bytes, transformers' own default


def write_folder(
    folder: Path,
    config: dict[str, Any],
    arrays: Iterable[tuple[str, np.ndarray]],
    max_shard_size: int = SHARD_SIZE,
) -> None:
    """Writes config.json and the weights; those of an earlier save are replaced once all are written.

    Args:
      folder: created if missing.
      config: the content of config.json.
      arrays: by their names there, written in this order.
      max_shard_size: largest size of a weight file in bytes (one larger array is still one file).
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[list[str]] = []
    total = 0
    with tempfile.TemporaryDirectory(dir=folder, prefix=".model-") as scratch:
        drafts: list[Path] = []
        for shard in _shards(arrays, max_shard_size):
            drafts.append(Path(scratch) / f"{len(drafts)}.safetensors")
            save_file(shard, drafts[-1], metadata={"format": "pt"})
            written.append(list(shard))
            total += sum(array.nbytes for array in shard.values())
        for stale in folder.glob("model*.safetensors*"):
            stale.unlink()
        names = ["model.safetensors"]
        if len(drafts) > 1:
            names = [f"model-{i + 1:05d}-of-{len(drafts):05d}.safetensors" for i in range(len(drafts))]
            where = {array: name for shard, name in zip(written, names, strict=True) for array in shard}
            index = {"metadata": {"total_size": total}, "weight_map": where}
            write_json(folder / "model.safetensors.index.json", index)
        for draft, name in zip(drafts, names, strict=True):
            draft.replace(folder / name)
    write_json(folder / "config.json", config)


def _shards(arrays: Iterable[tuple[str, np.ndarray]], max_size: int) -> Iterable[dict[str, np.ndarray]]:
    """Groups arrays, in their order, into dictionaries of at most `max_size` bytes."""
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, array in arrays:
        if shard and size + array.nbytes > max_size:
            yield shard
            shard, size = {}, 0
        shard[name] = np.ascontiguousarray(array).reshape(array.shape)  # ascontiguousarray makes a scalar a vector
        size += array.nbytes
    yield shard


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Writes one JSON object, indented."""
    file.write_text(json.dumps(values, indent=2) + "\n")
