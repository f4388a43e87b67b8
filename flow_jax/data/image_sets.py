"""Sets of pictures with random access: in memory, in folders, or prepared by TFDS; decoded when they are read.

A set may be read by several threads at once and can be pickled. A picture that cannot be used raises BadRow.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from flow_jax.data import image_decoding
from train_jax.core import digests
from train_jax.core.errors import UserError
from train_jax.core.picture_folders import ENDINGS, pictures_below
from train_jax.core.row_errors import BadRow
from train_jax.core.tfds import open_builder, open_split


class Picture(NamedTuple):
    """Pixels, and the number of the class, 0 where there are none."""

    pixels: UInt8[np.ndarray, "I I C"]
    label: int


@runtime_checkable
class Pictures(Protocol):
    """One split of a set. `fingerprint` tells apart sets whose rows differ."""

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Picture: ...

    def label(self, index: int) -> int:
        """The class of a picture, which need not be decoded for that."""
        ...

    def name(self, index: int) -> str:
        """Names a row for people."""
        ...


class ArrayPictures:
    """Pictures in memory."""

    def __init__(self, images: UInt8[np.ndarray, "N I I C"], labels: Int[np.ndarray, " N"] | None = None):
        self.images = images
        self.labels = np.zeros(len(images), np.int32) if labels is None else labels
        self.fingerprint = _digest(images.tobytes(), self.labels.astype(np.int32).tobytes())

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Picture:
        return Picture(self.images[index], int(self.labels[index]))

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def name(self, index: int) -> str:
        return f"picture {index}"


class FolderPictures:
    """Picture files below a folder, in the order of their names; classes are the folders right below it, by name.

    Args:
      folder: of class folders, or of files without classes, see train_jax.core.picture_folders.
      size, channels: of the pictures as they are read.
      cache: folder that keeps digests of the files; None computes them anew.

    Attributes:
      identity: int32 [N], equal for files of equal bytes, see train_jax.core.digests.
      left_out: names of files and folders that are no pictures, by the reason.

    Raises:
      UserError: no such folder, or no pictures in it.
    """

    def __init__(self, folder: str | Path, size: int, channels: int, cache: str | Path | None = None):
        self.folder, self._size, self._channels = Path(folder).expanduser(), size, channels
        if not self.folder.is_dir():
            raise UserError(f"there is no folder {self.folder}: correct data.folder or data.held_out_folder.")
        found = pictures_below(self.folder)
        self.left_out = found.left_out
        self._files = sorted([*found.loose, *(file for group in found.classes.values() for file in group)])
        if not self._files:
            raise UserError(
                f"{self.folder} holds no pictures, expected files that end in {', '.join(ENDINGS)}, or folders of "
                "them: correct data.folder or data.held_out_folder."
            )
        if found.loose and found.classes:
            raise UserError(
                f"{self.folder} holds {found.loose[0]} beside folders of pictures, expected files alone or class "
                "folders alone: move one of them away."
            )
        self.classes = list(found.classes)
        self._numbers = {name: number for number, name in enumerate(self.classes)}
        place = digests.place_of(cache, "folder", str(self.folder.resolve()))
        bytes_of = digests.of_files([self.folder / file for file in self._files], place, "pictures")
        self.identity = digests.numbers(digests.keys(bytes_of))
        self.fingerprint = _digest(
            "\n".join(self._files).encode("utf-8", "surrogateescape"), f"{size}x{channels}".encode(), bytes_of.tobytes()
        )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Picture:
        try:
            data = (self.folder / self._files[index]).read_bytes()
        except OSError as error:
            raise BadRow(f"cannot be read ({error.strerror}): restore the file.") from error
        return Picture(image_decoding.decode(data, self._size, self._channels), self.label(index))

    def label(self, index: int) -> int:
        return self._numbers.get(self._files[index].partition("/")[0], 0)

    def name(self, index: int) -> str:
        return self._files[index]


class TfdsPictures:
    """A split of a data set that TFDS has prepared as array_record.

    Args:
      folder: the version folder, with dataset_info.json.
      split: one that it has, or a part: "train[:90%]".
      image, label: names of the features; no label is "".
      size, channels: of the pictures as they are read.

    Raises:
      UserError: no such folder, split or feature, or pictures of another number of channels.
    """

    def __init__(self, folder: str | Path, split: str, image: str, label: str, size: int, channels: int):
        self._split, self._image, self._label = split, image, label
        self._size, self._channels = size, channels
        path = Path(folder).expanduser()
        builder = open_builder(path)
        features = builder.info.features
        for key, name in (("image", image), ("label", label)):
            if name and name not in features:
                advice = ", or train without labels: data.conditional=False" if key == "label" else ""
                raise UserError(
                    f"{path} has no feature {name!r}, expected one of {', '.join(sorted(features))}: change "
                    f"data.{key}{advice}."
                )
        found = features[image].shape[-1]
        if found not in (None, channels):
            raise UserError(
                f"pictures of {path} have {found} channel(s), expected {channels}: set data.channels={found}, or "
                "choose other data."
            )
        self.classes = [str(number) for number in range(features[label].num_classes)] if label else []
        self._examples: Any = open_split(builder, path, split, image)
        info = builder.info
        num_bytes = info.splits[split.partition("[")[0]].num_bytes
        self.fingerprint = _digest(
            repr((info.full_name, split, len(self._examples), image, label, size, channels, num_bytes)).encode()
        )

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Picture:
        example = self._read(index)
        return Picture(image_decoding.decode(example[self._image], self._size, self._channels), self._class(example))

    def label(self, index: int) -> int:
        return self._class(self._read(index)) if self._label else 0

    def name(self, index: int) -> str:
        return f"{self._split} example {index}"

    def _read(self, index: int) -> dict[str, Any]:
        try:
            return self._examples[int(index)]
        except (RuntimeError, ValueError) as error:  # array_record's checksums, or a record that does not parse
            raise BadRow(f"cannot be read ({error}): prepare the data again.") from error

    def _class(self, example: dict[str, Any]) -> int:
        return int(example[self._label]) if self._label else 0


class Subset:
    """Some rows of a set, by number."""

    def __init__(self, pictures: Pictures, rows: Sequence[int] | np.ndarray):
        self._pictures, self._rows = pictures, np.asarray(rows, np.int64)
        self.fingerprint = _digest(pictures.fingerprint.encode(), self._rows.tobytes())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Picture:
        return self._pictures[int(self._rows[index])]

    def label(self, index: int) -> int:
        return self._pictures.label(int(self._rows[index]))

    def name(self, index: int) -> str:
        return self._pictures.name(int(self._rows[index]))


def _digest(*parts: bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()[:16]
