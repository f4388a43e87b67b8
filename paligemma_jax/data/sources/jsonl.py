"""A user's own data: a folder with images and a JSONL file, one object `{"image", "prefix", "suffix"}` a line.

    my_data/
        train.jsonl         {"image": "images/0001.png", "prefix": "answer en What is this?", "suffix": "a duck"}
        validation.jsonl
        images/0001.png

Captions need no prefix: `{"image", "caption"}`, where the caption's key may have another name. Image paths are relative
to the folder of the JSONL file and may not leave it. Other keys of a line are ignored. Lines whose image files have
equal bytes share an image, whatever the names. Only the byte offset and the image number of each line are kept in
memory.
"""

import array
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from paligemma_jax.data.paths import inside
from paligemma_jax.data.records import BadRow, Record, RecordSource, checked_index, fingerprint_of
from paligemma_jax.data.row_texts import check_texts
from paligemma_jax.data.sources.splits import own_source
from train_jax.core import digests
from train_jax.core.errors import UserError, quoted

FIELDS = ("image", "prefix", "suffix")


class JsonlRecords(RecordSource):
    """The lines of one JSONL file, in file order; empty lines are skipped.

    A malformed line keeps its row and raises `BadRow` when it is read; a path that leaves the folder is refused when
    the file is opened, whatever the policy for bad rows.

    Args:
      path: the JSONL file; or its folder, which must hold SPLIT.jsonl, or without `split` exactly one JSONL file.
      split: name of the file within a folder, such as "train" or "validation".
      caption: key of the caption, for pairs of an image and a text; it becomes the record's suffix, with an empty
        prefix. None: lines have a prefix and a suffix.
      cache: folder that stores digests of the images; None computes them every time.

    Raises:
      UserError: if there is no such file, it has no rows, or an image path leaves its folder (naming file and line).
    """

    def __init__(
        self,
        path: str | Path,
        split: str | None = None,
        caption: str | None = None,
        cache: str | Path | None = None,
    ):
        self._fields = FIELDS if caption is None else ("image", caption)
        self.file = _jsonl_file(Path(path).expanduser(), split)
        self._offsets, self._lines = array.array("q"), array.array("q")
        numbers, names, digest, offset = array.array("q"), {}, hashlib.sha256(), 0
        with self.file.open("rb") as file:
            for line_number, line in enumerate(file, start=1):
                digest.update(line)
                if line.strip():
                    self._offsets.append(offset)
                    self._lines.append(line_number)
                    numbers.append(self._image_number(line, line_number, names))
                offset += len(line)
        if not self._offsets:
            raise UserError(f"{self.file} has no rows, expected one JSON object per line; add rows.")
        cache_file = digests.cache_file_of(cache, "jsonl", str(self.file.resolve()))
        digests_of = digests.of_files(
            [self.file.parent / name for name in names], cache_file, f"images of {self.file.name}"
        )
        # Lines that name the same missing file share an image number; a malformed line has one of its own.
        keys = [key or name for key, name in zip(digests.keys(digests_of), names, strict=True)]
        self._images = digests.numbers(keys[number] if number >= 0 else None for number in numbers)
        more = {} if caption is None else {"caption": caption}
        images = hashlib.sha256(digests_of.tobytes()).hexdigest()
        self.fingerprint = fingerprint_of(kind="jsonl", digest=digest.hexdigest(), images=images, **more)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Record:
        index = checked_index(index, len(self))
        name, prefix, suffix = self._texts(index)
        try:
            image = (self.file.parent / name).read_bytes()
        except OSError as error:
            raise BadRow(
                f"{self.file} line {self._lines[index]}: cannot read {quoted(name)} ({error.strerror}), "
                "expected an image file; add it or remove the line."
            ) from error
        return Record(image, name, int(self._images[index]), prefix, suffix)

    def texts(self, index: int) -> tuple[str, str]:
        """Returns prefix and suffix of a row without reading its image. Raises BadRow."""
        return self._texts(checked_index(index, len(self)))[1:]

    def suffix(self, index: int) -> str:
        """Returns the suffix of a row without reading its image. Raises BadRow."""
        return self._texts(checked_index(index, len(self)))[2]

    def image_numbers(self) -> np.ndarray:
        """Returns `image_index` of every row, without reading any row."""
        return self._images

    def _texts(self, index: int) -> tuple[str, str, str]:
        """Returns image, prefix and suffix of a row."""
        with self.file.open("rb") as file:
            file.seek(self._offsets[index])
            image, *texts = self._parse(file.readline(), self._lines[index])
        prefix, suffix = texts if len(texts) == 2 else ("", *texts)
        return image, prefix, suffix

    def _parse(self, line: bytes, line_number: int) -> list[str]:
        """Returns the texts of a line, in the order of the fields."""
        where = f"{self.file} line {line_number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"{where} is no JSON ({error}); correct the line.") from None
        texts = check_texts(row, self._fields, where, "correct the line")
        if "\0" in texts[0] or texts[0].startswith("data:"):
            raise BadRow(
                f"{where} has the image {quoted(texts[0])}, expected an object with the path of a file; write the "
                "image to one, or correct the line."
            )
        return texts

    def _image_number(self, line: bytes, line_number: int, names: dict[str, int]) -> int:
        """Returns the position in `names`, which grows, of the image that a line names; -1 for a malformed line."""
        try:
            name = self._parse(line, line_number)[0]
        except BadRow:
            return -1
        if name not in names:
            folder = self.file.parent.resolve()
            if not inside(folder, name):
                raise UserError(
                    f"{self.file} line {line_number}: the image path {quoted(name)} leaves the folder of the "
                    "file, expected a path within it; move the image there."
                )
            names[name] = len(names)
        return names[name]


def _jsonl_file(path: Path, split: str | None) -> Path:
    if path.is_file():
        return path
    names = sorted(file.name for file in path.glob("*.jsonl"))
    expected = f"{split}.jsonl" if split else None
    if expected in names:
        return path / expected
    if expected is None and len(names) == 1:
        return path / names[0]
    raise UserError(
        f"{path} holds {', '.join(names) or 'no JSONL file'}, expected {expected or 'exactly one JSONL file'}; "
        "add the file or correct the path."
    )


def open_questions(data: ConfigDict, split: str, progress: Callable[[str], object]) -> JsonlRecords:
    """Opens the JSONL file of a split; see splits.open_source."""
    del progress
    return JsonlRecords(own_source(data), split, cache=data.cache_dir)


def open_captions(data: ConfigDict, split: str, progress: Callable[[str], object]) -> JsonlRecords:
    """Opens the captions of a contrastive run; see splits.open_source."""
    del progress
    return JsonlRecords(data.source, split, data.caption, data.cache_dir)
