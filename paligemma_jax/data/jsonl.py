"""A user's own data: a folder with images and a JSONL file, one object `{"image", "prefix", "suffix"}` a line.

    my_data/
        train.jsonl         {"image": "images/0001.png", "prefix": "answer en What is this?", "suffix": "a duck"}
        validation.jsonl
        images/0001.png

Captions need no prefix: `{"image", "caption"}`, where the caption's key may have another name. Image paths are relative
to the folder of the JSONL file and may not leave it. Further keys of a line are ignored. Only the byte offset and the
image number of each line are held in memory.
"""

import array
import hashlib
import json
from pathlib import Path

import numpy as np

from paligemma_jax.data.paths import inside
from paligemma_jax.data.records import BadRow, Record, checked_index, fingerprint_of
from train_jax.errors import UserError

FIELDS = ("image", "prefix", "suffix")


class JsonlRecords:
    """The lines of one JSONL file, in file order; empty lines are no rows.

    A malformed line keeps its row and raises `BadRow` when it is read; a path that leaves the folder is refused at
    once, whatever the policy for bad rows.

    Args:
      path: the JSONL file; or its folder, which must hold SPLIT.jsonl, or without `split` exactly one JSONL file.
      split: name of the file within a folder, such as "train" or "validation".
      caption: key of the caption, for pairs of an image and a text; it is the record's suffix, and the prefix is empty.
        None: lines have a prefix and a suffix.

    Raises:
      UserError: if there is no such file, it has no rows, or an image path leaves its folder (naming file and line).
    """

    def __init__(self, path: str | Path, split: str | None = None, caption: str | None = None):
        self._fields = FIELDS if caption is None else ("image", caption)
        self.file = _jsonl_file(Path(path).expanduser(), split)
        self._offsets, self._lines = array.array("q"), array.array("q")
        images, numbers, digest, offset = array.array("q"), {}, hashlib.sha256(), 0
        with open(self.file, "rb") as file:
            for line_number, line in enumerate(file, start=1):
                digest.update(line)
                if line.strip():
                    self._offsets.append(offset)
                    self._lines.append(line_number)
                    images.append(self._image_number(line, line_number, numbers))
                offset += len(line)
        if not self._offsets:
            raise UserError(f"{self.file} has no rows, expected one JSON object a line; fill it.")
        self._images = images
        more = {} if caption is None else {"caption": caption}
        self.fingerprint = fingerprint_of(kind="jsonl", digest=digest.hexdigest(), **more)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Record:
        index = checked_index(index, len(self))
        with open(self.file, "rb") as file:
            file.seek(self._offsets[index])
            row = self._parse(file.readline(), self._lines[index])
        try:
            image = (self.file.parent / row["image"]).read_bytes()
        except OSError as error:
            raise BadRow(
                f"{self.file} line {self._lines[index]}: cannot read {row['image']} ({error.strerror}), expected an "
                "image file; add it or remove the line."
            ) from error
        prefix = row["prefix"] if "prefix" in self._fields else ""
        return Record(image, row["image"], self._images[index], prefix, row[self._fields[-1]])

    def image_numbers(self) -> np.ndarray:
        """`image_index` of every row, without reading any."""
        return np.asarray(self._images)

    def _parse(self, line: bytes, line_number: int) -> dict[str, str]:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BadRow(f"{self.file} line {line_number} is no JSON ({error}); mend the line.") from error
        texts = isinstance(row, dict) and all(isinstance(row.get(field), str) for field in self._fields)
        if not texts or "\0" in row["image"]:
            raise BadRow(
                f"{self.file} line {line_number} is {line[:80].decode(errors='replace').strip()}, expected an object "
                f"with the texts {', '.join(self._fields)}; mend the line."
            )
        return row

    def _image_number(self, line: bytes, line_number: int, numbers: dict[str, int]) -> int:
        """The image's number by first appearance; a malformed line has one of its own."""
        try:
            name = self._parse(line, line_number)["image"]
        except BadRow:
            return numbers.setdefault(f"\0{line_number}", len(numbers))  # no name holds a NUL
        if name not in numbers:
            folder = self.file.parent.resolve()
            if not inside(folder, name):
                raise UserError(
                    f"{self.file} line {line_number}: the image path {name!r} leaves the folder of the file, expected "
                    "a path within it; move the image there."
                )
            numbers[name] = len(numbers)
        return numbers[name]


def _jsonl_file(path: Path, split: str | None) -> Path:
    if path.is_file():
        return path
    found = sorted(file.name for file in path.glob("*.jsonl"))
    wanted = f"{split}.jsonl" if split else None
    if wanted in found:
        return path / wanted
    if wanted is None and len(found) == 1:
        return path / found[0]
    raise UserError(
        f"{path} holds {', '.join(found) or 'no JSONL file'}, expected {wanted or 'exactly one JSONL file'}; "
        "add the file or correct the path."
    )
