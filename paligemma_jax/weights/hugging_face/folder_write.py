"""Writes a Hugging Face folder: config.json, and safetensors in one file or in shards with an index."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from train_jax.core.files import replacing

SHARD_SIZE = 5 * 10**9  # bytes, transformers' own default


def write_folder(
    folder: Path,
    config: dict[str, Any],
    arrays: Iterable[tuple[str, np.ndarray]],
    max_shard_size: int = SHARD_SIZE,
) -> None:
    """Writes config.json and the weights; replaces the weights of an earlier save once all are written.

    Args:
      folder: created if missing.
      config: the content of config.json.
      arrays: by their names there, written in this order.
      max_shard_size: largest size of a weight file in bytes (one larger array is still one file).
    """
    written: list[list[str]] = []
    total = 0
    with replacing(folder, stale="model*.safetensors*") as draft:
        for number, shard in enumerate(_shards(arrays, max_shard_size)):
            save_file(shard, draft / f"{number}.safetensors", metadata={"format": "pt"})
            written.append(list(shard))
            total += sum(array.nbytes for array in shard.values())
        names = ["model.safetensors"]
        if len(written) > 1:
            names = [f"model-{i + 1:05d}-of-{len(written):05d}.safetensors" for i in range(len(written))]
            where = {array: name for shard, name in zip(written, names, strict=True) for array in shard}
            index = {"metadata": {"total_size": total}, "weight_map": where}
            write_json(draft / "model.safetensors.index.json", index)
        for number, name in enumerate(names):
            (draft / f"{number}.safetensors").rename(draft / name)
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
