"""Image sets with random access: in memory, in folders, or prepared by TFDS. Images are decoded when they are read.

A set may be read by several threads at once and can be pickled. An image that cannot be used raises BadRow.
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
from train_jax.core.formats.image_folders import ENDINGS, find_images
from train_jax.core.formats.tfds import open_builder, open_split
from train_jax.core.row_errors import BadRow


class LabeledImage(NamedTuple):
    """Pixels, and the number of the class, 0 without classes."""

    pixels: UInt8[np.ndarray, "I I C"]
    label: int


@runtime_checkable
class ImageSet(Protocol):
    """A split of a data set. `fingerprint` differs between sets with different images."""

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> LabeledImage: ...

    def label(self, index: int) -> int:
        """Returns the class of an image without decoding it."""
        ...

    def name(self, index: int) -> str:
        """Returns a name for messages."""
        ...


class ArrayImages:
    """Images in memory."""

    def __init__(self, images: UInt8[np.ndarray, "N I I C"], labels: Int[np.ndarray, " N"] | None = None):
        self.images = images
        self.labels = np.zeros(len(images), np.int32) if labels is None else labels
        self.fingerprint = _digest(images.tobytes(), self.labels.astype(np.int32).tobytes())

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> LabeledImage:
        return LabeledImage(self.images[index], int(self.labels[index]))

    def label(self, index: int) -> int:
        """Returns the class of an image."""
        return int(self.labels[index])

    def name(self, index: int) -> str:
        """Returns a name for messages."""
        return f"image {index}"


class FolderImages:
    """Image files below a folder, sorted by name; the classes are the names of its subfolders.

    Args:
      folder: contains class folders, or files without classes, see train_jax.core.formats.image_folders.
      size, channels: of the decoded images.
      cache: folder in which digests of the files are cached; None for no cache.

    Attributes:
      identity: int32 [N], equal for files with equal bytes, see train_jax.core.digests.
      left_out: names of files and folders that are not images, by reason.

    Raises:
      UserError: the folder does not exist or contains no images.
    """

    def __init__(self, folder: str | Path, size: int, channels: int, cache: str | Path | None = None):
        self.folder, self._size, self._channels = Path(folder).expanduser(), size, channels
        if not self.folder.is_dir():
            raise UserError(f"there is no folder {self.folder}: correct data.folder or data.held_out_folder.")
        listing = find_images(self.folder)
        self.left_out = listing.left_out
        self._files = sorted([*listing.loose, *(file for files in listing.classes.values() for file in files)])
        if not self._files:
            raise UserError(
                f"{self.folder} contains no images, expected files that end in {', '.join(ENDINGS)}, or folders of "
                "them: correct data.folder or data.held_out_folder."
            )
        if listing.loose and listing.classes:
            raise UserError(
                f"{self.folder} contains {listing.loose[0]} beside folders of images, expected only files or only "
                "class folders: move one of them away."
            )
        self.classes = list(listing.classes)
        self._numbers = {name: number for number, name in enumerate(self.classes)}
        cache_file = digests.cache_file_of(cache, "folder", str(self.folder.resolve()))
        file_digests = digests.of_files([self.folder / file for file in self._files], cache_file, "images")
        self.identity = digests.numbers(digests.keys(file_digests))
        names = "\n".join(self._files).encode("utf-8", "surrogateescape")
        self.fingerprint = _digest(names, f"{size}x{channels}".encode(), file_digests.tobytes())

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> LabeledImage:
        try:
            data = (self.folder / self._files[index]).read_bytes()
        except OSError as error:
            raise BadRow(f"cannot be read ({error.strerror}): restore the file.") from error
        return LabeledImage(image_decoding.decode(data, self._size, self._channels), self.label(index))

    def label(self, index: int) -> int:
        """Returns the class of an image."""
        return self._numbers.get(self._files[index].partition("/")[0], 0)

    def name(self, index: int) -> str:
        """Returns the path below the folder."""
        return self._files[index]


class TfdsImages:
    """A split of a data set prepared by TFDS as array_record.

    Args:
      folder: the version folder, which contains dataset_info.json.
      split: name of a split, or a part of one such as "train[:90%]".
      image, label: names of the features; label="" for no labels.
      size, channels: of the decoded images.

    Raises:
      UserError: the folder, split or feature does not exist, or images have another number of channels.
    """

    def __init__(self, folder: str | Path, split: str, image: str, label: str, size: int, channels: int):
        self._split, self._image, self._label = split, image, label
        self._size, self._channels = size, channels
        path = Path(folder).expanduser()
        builder = open_builder(path)
        features: Any = builder.info.features
        for key, name in (("image", image), ("label", label)):
            if name and name not in features:
                advice = ", or train without labels: data.conditional=False" if key == "label" else ""
                raise UserError(
                    f"{path} has no feature {name!r}, expected one of {', '.join(sorted(features))}: change "
                    f"data.{key}{advice}."
                )
        own_channels = features[image].shape[-1]
        if own_channels not in (None, channels):
            raise UserError(
                f"images of {path} have {own_channels} channel(s), expected {channels}: set "
                f"data.channels={own_channels}, or choose other data."
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

    def __getitem__(self, index: int) -> LabeledImage:
        example = self._read(index)
        return LabeledImage(
            image_decoding.decode(example[self._image], self._size, self._channels), self._class(example)
        )

    def label(self, index: int) -> int:
        """Returns the class of an image."""
        return self._class(self._read(index)) if self._label else 0

    def name(self, index: int) -> str:
        """Returns a name for messages."""
        return f"{self._split} example {index}"

    def _read(self, index: int) -> dict[str, Any]:
        try:
            return self._examples[int(index)]
        except (RuntimeError, ValueError) as error:  # a wrong checksum, or a record that cannot be parsed
            raise BadRow(f"cannot be read ({error}): prepare the data again.") from error

    def _class(self, example: dict[str, Any]) -> int:
        return int(example[self._label]) if self._label else 0


class ImageSubset:
    """Some images of a set, by number."""

    def __init__(self, images: ImageSet, rows: Sequence[int] | np.ndarray):
        self._images, self._rows = images, np.asarray(rows, np.int64)
        self.fingerprint = _digest(images.fingerprint.encode(), self._rows.tobytes())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> LabeledImage:
        return self._images[int(self._rows[index])]

    def label(self, index: int) -> int:
        """Returns the class of an image."""
        return self._images.label(int(self._rows[index]))

    def name(self, index: int) -> str:
        """Returns the image's name in the whole set."""
        return self._images.name(int(self._rows[index]))


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]
