"""Reads the weights of a Hugging Face folder: safetensors in one file, or in shards with an index."""

from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from paligemma_jax.files.side_files import KnownKeys, account, read_json
from train_jax.core.errors import UserError

# Spellings of one prefix over the releases of transformers; all are read, the first of each pair is written.
PREFIXES = (
    ("language_model.model.", "model.language_model."),
    ("vision_tower.vision_model.", "model.vision_tower.vision_model."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.vision_model.", "vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Every array of every shard is read and accounted for, whichever shard the map gives.
INDEX_KEYS = KnownKeys(read=frozenset({"weight_map"}), idle=frozenset({"metadata"}))
# safetensors' names of the dtypes that weights are released in.
DTYPES = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32}


def canonical(name: str) -> str:
    """Returns the spelling of a key that the name table uses."""
    if name in ("lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight"):
        return "lm_head.weight"
    for ours, theirs in PREFIXES:
        if name.startswith(ours):
            return name
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    return name


class Folder:
    """Reads the arrays of a folder's safetensors files on demand; opens nothing outside the folder."""

    def __init__(self, path: Path, file: str | None = None, rename: Callable[[str], str] = canonical):
        """Opens `file`, or the files of a model's weights if None; `rename` maps a file's key to the name used here."""
        self.path = path
        self.files = [path / each for each in ([file] if file else self._weight_files(path))]
        self._where: dict[str, tuple[Path, str]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for shard in self.files:
            with self._open(shard) as handle:
                for key in handle.keys():  # noqa: SIM118 (no mapping)
                    name = rename(key)
                    if name in self._where:
                        raise UserError(
                            f"{path} holds one array twice, as {self._where[name][1]} and as {key}: remove one of them."
                        )
                    self._where[name] = shard, key
                    self._shapes[name] = tuple(handle.get_slice(key).get_shape())

    @classmethod
    def _weight_files(cls, path: Path) -> list[str]:
        """Returns the files of a model's weights; a single file takes precedence over shards, as in transformers."""
        shards = cls._shards(path / INDEX) if (path / INDEX).exists() else None  # refuses files outside the folder
        if (path / SINGLE).exists():
            return [SINGLE]
        if shards is not None:
            return shards
        raise UserError(f"{path} holds no {SINGLE} and no {INDEX}: give a folder as transformers saves it.")

    @staticmethod
    def _shards(index: Path) -> list[str]:
        """Returns the files that an index names, all of them beside it."""
        values = read_json(index)
        account(values, INDEX_KEYS, index)
        weight_map = values.get("weight_map")
        files = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        if not files or not all(isinstance(file, str) for file in files):
            raise UserError(f"{index} has no weight_map from arrays to files: download it again.")
        files = sorted(files)
        outside = [file for file in files if file == ".." or Path(file).name != file]
        if outside:
            raise UserError(f"{index} points to {outside[0]!r}, outside its folder: shards must lie beside it.")
        return files

    @staticmethod
    def _open(file: Path):
        """Opens a memory map of the file. It is closed after each array, as otherwise its pages would stay resident."""
        try:
            return safe_open(file, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read as safetensors ({error}): download it again.") from None

    def names(self) -> set[str]:
        """Returns the names of all arrays."""
        return set(self._where)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of all arrays, without reading them."""
        return dict(self._shapes)

    def key(self, name: str) -> str:
        """Returns the file's own name of an array."""
        return self._where[name][1]

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """Returns the shape of an array of `rank` axes, without reading it."""
        if name not in self._where:
            raise UserError(
                f"{self.path} has no array {name}: it is not a PaliGemma, SigLIP or CLIP as transformers saves it."
            )
        shape = self._shapes[name]
        if len(shape) != rank:
            key = self._where[name][1]
            raise UserError(f"{self.path}: {key} has shape {shape}, expected {rank} axes: it belongs to another model.")
        return shape

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype of an array, without reading it."""
        file, key = self._where[name]
        with self._open(file) as handle:
            return np.dtype(DTYPES.get(handle.get_slice(key).get_dtype(), np.float32))

    def __getitem__(self, name: str) -> np.ndarray:
        file, key = self._where[name]
        with self._open(file) as handle:
            try:
                return handle.get_tensor(key)
            except (SafetensorError, TypeError, KeyError, AttributeError) as error:  # a dtype that numpy lacks
                raise UserError(f"{file}: {key} cannot be read ({error}): save it in a float dtype.") from None

    def layers(self, name: str) -> Iterator[np.ndarray]:
        """Yields the slices of an array's first axis."""
        yield from self[name]
