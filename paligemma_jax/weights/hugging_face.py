"""PaliGemma 1 and 2 as transformers saves them: folders read, and written so that transformers opens them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from paligemma_jax.data.images import Preprocessing
from paligemma_jax.models.paligemma import PaliGemma, PaliGemmaConfig
from paligemma_jax.weights.checkpoint import Checkpoint
from paligemma_jax.weights.folder import Folder, read_json
from paligemma_jax.weights.hugging_face_config import model_config, read_config, to_hugging_face
from paligemma_jax.weights.hugging_face_names import EMBEDDING, rows
from paligemma_jax.weights.tables import write_rows
from paligemma_jax.weights.tokenizer_files import copy_tokenizer
from train_jax import params
from train_jax.errors import UserError

LM_HEAD = "lm_head.weight"
SHARD_SIZE = 5 * 10**9  # bytes, transformers' own default
IMAGE_TOKEN = 257_152  # of all released models


def open_folder(folder: Path) -> Checkpoint:
    """A folder as transformers saves it; the tied output table may be stored a second time.

    Raises:
      UserError: files that are missing, broken or of another architecture, or an output table of its own.
    """
    arrays = Folder(folder)
    config = model_config(read_config(folder), arrays, _preprocessing(folder))
    names = arrays.names()
    if LM_HEAD in names and not np.array_equal(arrays[LM_HEAD], arrays[EMBEDDING]):
        raise UserError(f"{folder}: {LM_HEAD} differs from {EMBEDDING}, expected the tied table: train it tied.")
    return Checkpoint(arrays, names - {LM_HEAD}, rows(config.decoder.post_norms), config, EMBEDDING)


def _preprocessing(folder: Path) -> Preprocessing | None:
    """A folder's own preprocessor_config.json, where it has one."""
    file = folder / "preprocessor_config.json"
    return Preprocessing.from_hugging_face(read_json(file)) if file.exists() else None


def save_hugging_face(
    model: PaliGemma, folder: str | Path, tokenizer: str | Path | None = None, max_shard_size: int = SHARD_SIZE
) -> None:
    """Writes a model as a folder that transformers opens: config, weights, preprocessor and tokenizer.

    Args:
      model: with plain kernels and without adapters; written in the dtype it has.
      folder: made if missing; the weights of an earlier save in it are replaced.
      tokenizer: where the tokenizer's files are: the folder the model came from, a tokenizer.model, or "tiny". They are
        copied as they are. None writes none, and transformers then opens the model but no processor.
      max_shard_size: bytes a weight file holds at most (but for an array larger than that); several get an index.

    Raises:
      UserError: the model has adapters or quantised kernels, or there are no tokenizer files.
    """
    folder, config = Path(folder).expanduser(), model.config
    image_token = config.image_token
    if image_token is None:
        image_token = min(IMAGE_TOKEN, config.decoder.vocab_size)
    save(folder, config, params.flatten(model), image_token, max_shard_size)
    if config.preprocessing is not None:
        processor = {"processor_class": "PaliGemmaProcessor", "image_seq_length": config.vision.num_patches}
        _write_json(folder / "preprocessor_config.json", config.preprocessing.to_hugging_face() | processor)
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder)


def save(
    folder: Path,
    config: PaliGemmaConfig,
    params: Mapping[str, jax.Array | np.ndarray],
    image_token: int,
    max_shard_size: int = SHARD_SIZE,
) -> None:
    """Writes config.json and the weights alone.

    Args:
      image_token: id that stands for a patch in transformers' input, usually the first after the tokenizer's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arrays = write_rows(rows(config.decoder.post_norms), params, str(folder))
    written: list[list[str]] = []
    total = 0
    for shard in _shards(arrays, max_shard_size):
        save_file(shard, folder / f"part-{len(written)}.partial", metadata={"format": "pt"})
        written.append(list(shard))
        total += sum(array.nbytes for array in shard.values())
    for stale in folder.glob("model*.safetensors*"):
        stale.unlink()
    files = ["model.safetensors"]
    if len(written) > 1:
        files = [f"model-{i + 1:05d}-of-{len(written):05d}.safetensors" for i in range(len(written))]
        where = {name: file for names, file in zip(written, files, strict=True) for name in names}
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    for i, file in enumerate(files):
        (folder / f"part-{i}.partial").replace(folder / file)
    _write_json(folder / "config.json", to_hugging_face(config, image_token))


def _shards(arrays: Iterator[tuple[str, np.ndarray]], max_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Groups arrays, in their order, into dictionaries of at most `max_size` bytes."""
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, array in arrays:
        if shard and size + array.nbytes > max_size:
            yield shard
            shard, size = {}, 0
        shard[name] = np.ascontiguousarray(array)
        size += array.nbytes
    yield shard


def _write_json(file: Path, values: dict) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")
