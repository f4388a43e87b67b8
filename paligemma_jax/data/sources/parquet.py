"""Question answering data in parquet shards as the Hub stores them, for example `HuggingFaceM4/clevr`.

Columns `question`, `image` and `answer`; one row per question, each with its own copy of the image: a struct of `bytes`
and perhaps `path`, bytes alone, or a list of one of these. Parquet's unit of access is the row group: reading one row
decodes its whole group. The most recently used groups are cached up to a number of bytes, so memory is bounded by that
number plus one group per reading thread, whatever the size of the data.
"""

import glob
import hashlib
import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from paligemma_jax.data.byte_lru import ByteLRU
from paligemma_jax.data.records import BadRow, Record, RecordSource, checked_index, fingerprint_of, prompt_checked
from paligemma_jax.data.row_texts import check_texts
from paligemma_jax.data.sources.splits import own_source
from train_jax.core import digests
from train_jax.core.errors import UserError, cut

COLUMNS = ("question", "image", "answer")
_BATCH = 64  # images in memory while all are digested
# Raised by pyarrow for damaged data, and for values without a Python type: a date beyond the year 9999, a time in an
# unknown time zone.
_UNREADABLE = (ValueError, OSError, OverflowError, NotImplementedError, KeyError)


class ParquetQuestions(RecordSource):
    """The rows of all shards of one split, ordered by file name, then row.

    Rows whose images have equal bytes share an image index, whatever their paths; a row without an image has one of its
    own. All shards are read once for this when they are opened.

    Args:
      folder: searched with all subfolders for `SPLIT-*.parquet`, the Hub's naming, and `SPLIT.parquet`; those below a
        hidden name (.cache) or a special one (__MACOSX) are left out, as `datasets` does.
      split: "train", "validation" or "test", as in the names of the shards.
      prompt: the prefix, with {question} in place of the question.
      cache_bytes: size of the cached row groups, in bytes of Arrow memory.
      cache: folder that stores the digests of the shards until one of them changes; None reads them every time.

    Raises:
      UserError: if pyarrow is not installed, there are no shards or rows, or a shard is damaged or lacks a column.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str = "train",
        prompt: str = "{question}",
        cache_bytes: int = 256 << 20,
        cache: str | Path | None = None,
    ):
        folder = Path(folder).expanduser()
        self._files = _shards(folder, split)
        if not self._files:
            raise UserError(
                f"{folder} holds no {split}-*.parquet, expected the shards of a Hub data set; "
                "download them there (docs/data.md) or correct the path or split."
            )
        self._prompt = prompt_checked(prompt)
        self._cache = ByteLRU(cache_bytes)
        self._groups: list[tuple[int, int]] = []  # (file, row group within it)
        sizes = []
        for number, file in enumerate(self._files):
            metadata = _open(file).metadata
            self._groups += [(number, group) for group in range(metadata.num_row_groups)]
            sizes += [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        if not len(self):
            raise UserError(f"{folder} holds no rows in its {split} shards, expected one per question; add rows.")
        cache_file = digests.cache_file_of(cache, "parquet", str(folder.resolve()), split)
        contents = digests.kept(cache_file, self._files, lambda: _digest_shards(self._files))
        self._image_index = digests.numbers(digests.keys(contents["images"]))
        names = [file.name for file in self._files]
        self.fingerprint = fingerprint_of(
            kind="parquet", split=split, prompt=prompt, shards=names, content=str(contents["content"])
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Record:
        index = checked_index(index, len(self))
        row = self._row(index)
        image, path = _image_of(row["image"])
        name = Path(path).name if path else f"row {index}"
        where = f"row {index} ({cut(name)})" if path else name
        if not image:
            count = isinstance(row["image"], list) and sum(_image_of(each)[0] is not None for each in row["image"])
            fault = f"holds {count} images, expected one" if count else "lacks image bytes, expected a file's"
            raise BadRow(f"{where} {fault}; correct the shard.")
        texts = {"question": row["question"], "answer": row["answer"]}
        question, answer = check_texts(texts, tuple(texts), where, "correct the shard")
        return Record(image, name, int(self._image_index[index]), self._prompt.replace("{question}", question), answer)

    def texts(self, index: int) -> tuple[str, str]:
        """Returns prefix and suffix of a row without reading its image. Raises BadRow."""
        index, fields = checked_index(index, len(self)), ("question", "answer")
        row = self._row(index, fields)
        question, answer = check_texts(row, fields, f"row {index}", "correct the shard")
        return self._prompt.replace("{question}", question), answer

    def suffix(self, index: int) -> str:
        """Returns the suffix of a row without reading its image. Raises BadRow."""
        index = checked_index(index, len(self))
        row = self._row(index, ("answer",))
        return check_texts(row, ("answer",), f"row {index}", "correct the shard")[0]

    def _row(self, index: int, columns: tuple[str, ...] = COLUMNS) -> dict[str, Any]:
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        table = self._cache.get((group, columns), lambda: self._load(group, columns))
        try:
            return {name: table[name][index - int(self._starts[group])].as_py() for name in columns}
        except _UNREADABLE as error:  # for example bytes that are not UTF-8 in a column of texts
            raise BadRow(f"row {index} cannot be read ({error}), expected texts in UTF-8; correct the shard.") from None

    def image_numbers(self) -> np.ndarray:
        """Returns `image_index` of every row, without reading any row."""
        return np.asarray(self._image_index)

    def _load(self, group: int, columns: tuple[str, ...]) -> tuple[Any, int]:
        number, group_in_file = self._groups[group]
        try:
            # Opened again: a shard's footer is small, and threads must not share a file object.
            table = _open(self._files[number]).read_row_group(group_in_file, columns=list(columns))
        except _UNREADABLE as error:
            raise BadRow(
                f"row group {group_in_file} of {self._files[number]} cannot be read ({error}), expected an intact "
                "shard; download it again."
            ) from error
        return table, table.nbytes


def _shards(folder: Path, split: str) -> list[Path]:
    """Returns the files of a split, sorted by name."""
    name = re.compile(rf"{re.escape(split)}(-.*)?\.(parquet|PARQUET)", re.DOTALL)
    within = ((file, file.relative_to(folder).parts) for file in folder.rglob(f"{glob.escape(split)}*"))
    return sorted(
        file
        for file, parts in within
        if name.fullmatch(file.name) and not any(part.startswith((".", "__")) for part in parts)
    )


def _open(file: Path) -> Any:
    """Opens a `pyarrow.parquet.ParquetFile` and checks its columns. Raises UserError."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UserError("parquet data need pyarrow, which is not installed; run pip install pyarrow.") from error
    try:
        shard = parquet.ParquetFile(file, pre_buffer=False)
    except _UNREADABLE as error:
        raise UserError(f"{file} is no intact parquet file ({error}); download it again.") from error
    names = shard.schema_arrow.names
    for count, fault in ((0, "lacks"), (2, "has more than once")):
        wrong = [name for name in COLUMNS if min(names.count(name), 2) == count]
        if wrong:
            raise UserError(
                f"{file} has columns {names} and {fault} {wrong}, expected each of {list(COLUMNS)} once; rename them."
            )
    return shard


def _image_of(value: Any) -> tuple[bytes | None, str | None]:
    """Returns bytes and path of an image in one of the Hub's forms; None for a missing part."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bytes):
        return value, None
    if not isinstance(value, Mapping):
        return None, None
    data, path = value.get("bytes"), value.get("path")
    return data if isinstance(data, bytes) else None, path if isinstance(path, str) else None


def _digest_shards(files: list[Path]) -> dict[str, np.ndarray]:
    """Returns `images`, the digest of every row's image (zeros if it has none), and `content`, one of all files."""
    content, images = hashlib.sha256(), []
    for file in tqdm(files, "Reading shards", disable=not sys.stderr.isatty()):
        with file.open("rb") as data:
            content.update(hashlib.file_digest(data, "sha256").digest())
        images += _digests_of(_open(file))
    return {"images": digests.stacked(images), "content": np.array(content.hexdigest())}


def _digests_of(shard: Any) -> Iterator[bytes]:
    """Yields the digest of every row's image; zeros for a damaged row group, whose rows are bad when they are read."""
    for group in range(shard.metadata.num_row_groups):
        rows = shard.metadata.row_group(group).num_rows
        try:
            batches = shard.iter_batches(_BATCH, row_groups=[group], columns=["image"])
            images = [digests.digest(_image_of(value.as_py())[0]) for batch in batches for value in batch.column(0)]
        except _UNREADABLE:
            images = []
        yield from images + [digests.digest(None)] * (rows - len(images))


def open_questions(data: ConfigDict, split: str, progress: Callable[[str], object]) -> ParquetQuestions:
    """Opens the parquet shards of a split; see splits.open_source."""
    del progress
    return ParquetQuestions(own_source(data), split, data.prompt, cache=data.cache_dir)
