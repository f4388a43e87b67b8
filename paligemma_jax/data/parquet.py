"""Question answering in parquet shards as the Hub stores them, for example `HuggingFaceM4/clevr`.

Columns `question`, `image` (a struct of `bytes` and `path`) and `answer`; one row per question, each with its own copy
of the image. Parquet's unit of access is the row group: reading one row decodes its whole group, so the groups used
last are kept up to a number of bytes, and memory stays bounded by that number plus one group
for each thread that reads, whatever the data's size.
"""

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax.data.lru import ByteLRU
from paligemma_jax.data.records import BadRow, Record, checked_index, fingerprint_of, prompt_checked
from train_jax.errors import UserError

COLUMNS = ("question", "image", "answer")


class ParquetQuestions:
    """The rows of all shards of one split, in the order of file names and rows.

    Rows whose `image.path` is equal share an image index; a row without a path has an image of its own.

    Args:
      folder: searched with all subfolders for `SPLIT-*.parquet`, the Hub's naming.
      split: "train", "validation" or "test", as the shards are named.
      prompt: the prefix, with {question} in place of the question.
      cache_bytes: size of the row groups kept, in bytes of Arrow memory.

    Raises:
      UserError: if pyarrow is not installed, there are no such shards, one is damaged, or lacks a column.
    """

    def __init__(
        self, folder: str | Path, split: str = "train", prompt: str = "{question}", cache_bytes: int = 256 << 20
    ):
        folder = Path(folder).expanduser()
        self._files = sorted(folder.rglob(f"{split}-*.parquet"))
        if not self._files:
            raise UserError(
                f"{folder} holds no {split}-*.parquet, expected the shards of a Hub data set; "
                "download them there (docs/data.md) or correct the path or split."
            )
        self._prompt = prompt_checked(prompt)
        self._cache = ByteLRU(cache_bytes)
        self._groups: list[tuple[int, int]] = []  # (file, row group within it)
        sizes, paths = [], []
        for number, file in enumerate(self._files):
            shard = _open(file)
            metadata = shard.metadata
            self._groups += [(number, group) for group in range(metadata.num_row_groups)]
            sizes += [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            paths += _image_paths(shard)
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._image_index = _numbered(paths)
        self.fingerprint = fingerprint_of(
            kind="parquet",
            split=split,
            prompt=prompt,
            shards=[(file.name, file.stat().st_size) for file in self._files],
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Record:
        index = checked_index(index, len(self))
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        table = self._cache.get(group, lambda: self._load(group))
        row = {name: table[name][index - int(self._starts[group])].as_py() for name in COLUMNS}
        image = row["image"] or {}
        name = Path(image.get("path") or f"row {index}").name
        if not image.get("bytes") or row["question"] is None:
            raise BadRow(f"row {index} ({name}) lacks image bytes or question, expected both; mend the shard.")
        prefix = self._prompt.replace("{question}", row["question"])
        return Record(image["bytes"], name, int(self._image_index[index]), prefix, row["answer"] or "")

    def image_numbers(self) -> np.ndarray:
        """`image_index` of every row, without reading any."""
        return np.asarray(self._image_index)

    def _load(self, group: int) -> tuple[Any, int]:
        number, group_in_file = self._groups[group]
        try:
            # Opened anew: a shard's footer is small, and a file object must not be shared between threads.
            table = _open(self._files[number]).read_row_group(group_in_file, columns=list(COLUMNS))
        except (ValueError, OSError) as error:  # pyarrow's errors for damaged data derive from these
            raise BadRow(
                f"row group {group_in_file} of {self._files[number]} cannot be read ({error}), expected an intact "
                "shard; download it again."
            ) from error
        return table, table.nbytes


def _open(file: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile` with the columns needed. Raises UserError."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UserError("parquet data need pyarrow, which is not installed; run pip install pyarrow.") from error
    try:
        shard = parquet.ParquetFile(file, pre_buffer=False)
    except (ValueError, OSError) as error:
        raise UserError(f"{file} is no intact parquet file ({error}); download it again.") from error
    missing = [name for name in COLUMNS if name not in shard.schema_arrow.names]
    if missing:
        raise UserError(
            f"{file} has columns {shard.schema_arrow.names} and lacks {missing}, expected {list(COLUMNS)}; "
            "rename the columns."
        )
    return shard


def _image_paths(shard: Any) -> list[str | None]:
    """The `path` of every row's image, read without the image bytes; None where there is none."""
    if "path" not in {field.name for field in shard.schema_arrow.field("image").type}:
        return [None] * shard.metadata.num_rows
    batches = shard.iter_batches(columns=["image.path"])
    return [image["path"] if image else None for batch in batches for image in batch.column(0).to_pylist()]


def _numbered(paths: list[str | None]) -> np.ndarray:
    """Numbers the distinct paths from 0 in order of appearance, every None as a distinct one; int32 [rows]."""
    numbers: dict[Any, int] = {}
    keys = (path if path else row for row, path in enumerate(paths))
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int32)
