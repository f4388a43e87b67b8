"""A user's own data: a folder with images and a JSONL file, one object `{"image", "prefix", "suffix"}` a line.

    my_data/
        train.jsonl         {"image": "images/0001.png", "prefix": "answer en What is this?", "suffix": "a duck"}
        validation.jsonl
        images/0001.png

Captions need no prefix: `{"image", "caption"}`, where the caption's key may have another name. Image paths are relative
to the folder of the JSONL file and may not leave it. Further keys of a line are ignored. An image is what its bytes
are: lines that name copies of one file share an image. Only the byte offset and the image number of each line are held
in memory.
"""

import array
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from paligemma_jax.data.paths import inside
from paligemma_jax.data.records import BadRow, Record, checked_index, fingerprint_of
from paligemma_jax.data.row_texts import check_texts
from paligemma_jax.data.sources.splits import own_source
from train_jax.core import digests
from train_jax.core.errors import UserError, quoted

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
      cache: folder that keeps digests of the images; None computes them anew.

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
        places, names, digest, offset = array.array("q"), {}, hashlib.sha256(), 0
        with open(self.file, "rb") as file:
            for line_number, line in enumerate(file, start=1):
                digest.update(line)
                if line.strip():
                    self._offsets.append(offset)
                    self._lines.append(line_number)
                    places.append(self._place(line, line_number, names))
                offset += len(line)
        if not self._offsets:
            raise UserError(f"{self.file} has no rows, expected one JSON object a line; fill it.")
        kept = digests.place_of(cache, "jsonl", str(self.file.resolve()))
        bytes_of = digests.of_files([self.file.parent / name for name in names], kept, f"images of {self.file.name}")
        # Lines that name one absent file share its absence; a malformed line shares nothing.
        keys = [key or name for key, name in zip(digests.keys(bytes_of), names, strict=True)]
        self._images = digests.numbers(keys[place] if place >= 0 else None for place in places)
        more = {} if caption is None else {"caption": caption}
        images = hashlib.sha256(bytes_of.tobytes()).hexdigest()
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

    def suffix(self, index: int) -> str:
        """The suffix of a row without its image. Raises BadRow."""
        return self._texts(checked_index(index, len(self)))[2]

    def image_numbers(self) -> np.ndarray:
        """`image_index` of every row, without reading any."""
        return self._images

    def _texts(self, index: int) -> tuple[str, str, str]:
        """Image, prefix and suffix of a row."""
        with open(self.file, "rb") as file:
            file.seek(self._offsets[index])
            image, *texts = self._parse(file.readline(), self._lines[index])
        return image, *(texts if len(texts) == 2 else ("", *texts))

    def _parse(self, line: bytes, line_number: int) -> list[str]:
        """The texts of a line, in the order of the fields."""
        where = f"{self.file} line {line_number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"{where} is no JSON ({error}); mend the line.") from None
        texts = check_texts(row, self._fields, where, "mend the line")
        if "\0" in texts[0] or texts[0].startswith("data:"):
            raise BadRow(
                f"{where} has the image {quoted(texts[0])}, expected an object with the path of a file; write the "
                "image to one, or mend the line."
            )
        return texts

    def _place(self, line: bytes, line_number: int, names: dict[str, int]) -> int:
        """The place among all `names` of the one that a line names; of a malformed line -1."""
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


def open_questions(data: ConfigDict, split: str, progress: Callable[[str], object]) -> JsonlRecords:
    """See splits.open_source."""
    del progress
    return JsonlRecords(own_source(data), split, cache=data.cache_dir)


def open_captions(data: ConfigDict, split: str) -> JsonlRecords:
    """Captions of a contrastive run, see tasks.contrastive.data."""
    return JsonlRecords(data.source, split, data.caption, data.cache_dir)
