"""Opens the images that a config names in `data.name`: a training and a held-out split, and their shape."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int, UInt8
from ml_collections import ConfigDict

from flow_jax.data import digit_scores, digits, synthetic_images
from flow_jax.data.image_sets import ArrayImages, FolderImages, ImageSet, ImageSubset, TfdsImages
from train_jax.core.config_keys import check_values, declared, key
from train_jax.core.errors import UserError
from train_jax.core.files import cache_dir
from train_jax.core.import_path import check_arguments, check_named, imported
from train_jax.core.row_errors import BadRows

BYTES = 256  # grey values of 8-bit images
_SPLIT = 0  # seed of the split of a folder
_READ = 256  # images read at once


@runtime_checkable
class Score(Protocol):
    """A measurement of samples that come in batches."""

    def add(self, images: UInt8[np.ndarray, "N I I C"], labels: Int[np.ndarray, " N"]) -> None:
        """Adds a batch of samples."""
        ...

    def results(self) -> dict[str, float]:
        """Returns the scores by name."""
        ...


@dataclasses.dataclass(frozen=True)
class ImageData:
    """The images of a run.

    Attributes:
      train, held_out: the two splits.
      size: side of an image in pixels.
      channels: 1 or 3.
      levels: number of grey values.
      num_classes: 0 without labels.
      scores: makes the scores of these data, beside those of all images.
      row_per_label: whether figures of samples have one row for each label.
    """

    train: ImageSet
    held_out: ImageSet
    size: int
    channels: int
    levels: int
    num_classes: int
    scores: Callable[[], Sequence[Score]] = tuple
    row_per_label: bool = True


class Splits(NamedTuple):
    """The two splits of a data set, and the names of its classes."""

    train: ImageSet
    held_out: ImageSet
    classes: Sequence[str]


class DatasetSpec(NamedTuple):
    """A value of `data.name`. Size, channels and classes are None if they depend on the data or the config."""

    open: Callable[[ConfigDict, int, int], Splits]
    size: int | None = None
    channels: int | None = None
    levels: int = BYTES
    num_classes: int | None = None
    scores: Callable[[], Sequence[Score]] = tuple


@dataclasses.dataclass(frozen=True)
class PixelKeys:
    """Keys of `config.data` of every flow of images: what is done to the pixels."""

    flip: bool = key(False, "whether half of the images, drawn anew in every step, are mirrored from left to right")
    dequantize: bool = key(
        True, "whether uniform noise of one grey value is added to the images; without it no likelihood is measured"
    )


@dataclasses.dataclass(frozen=True)
class ImageDataKeys(PixelKeys):
    """`config.data`: a data set of images."""

    name: str = key("digits", "the data: digits, shapes (synthetic), folder, tfds, or the import path of a DatasetSpec")
    folder: str | None = key(None, "folder of the images (as class folders or as files), or the version folder of tfds")
    held_out_folder: str | None = key(
        None, "folder of the held-out images of `folder`; None = a share of `folder` is held out"
    )
    held_out_fraction: float = key(
        0.02, "share of the images that is held out without held_out_folder", above=0, below=1
    )
    split: str = key("train", "name of the split of tfds to train on")
    held_out: str = key("test", "name of the split of tfds that is held out")
    image: str = key("image", "name of the image feature of tfds")
    label: str = key("label", "name of the label feature of tfds")
    image_size: int | None = key(
        None,
        "side of an image in pixels; larger images are cropped to a square and shrunk. None = that of the data, 8 "
        "for digits",
        minimum=1,
        architecture=True,
    )
    channels: int | None = key(
        None, "number of channels; None = 1 for digits, 3 for all others", choices=(1, 3), architecture=True
    )
    conditional: bool = key(True, "whether the model is conditioned on labels", architecture=True)
    num_classes: int | None = key(
        None, "number of classes; None = as many as the data have", minimum=1, architecture=True
    )
    num_examples: int = key(2000, "number of synthetic images (shapes) to train on", minimum=2)


def check_name(name: str) -> None:
    """Raises UserError for a `data.name` that is neither in `DATASETS` nor an import path."""
    check_named("data.name", name, DATASETS)


def _spec(config: ConfigDict) -> DatasetSpec:
    """Returns the DatasetSpec that `data.name` names, in `DATASETS` or by import path."""
    check_name(config.name)
    spec = DATASETS.get(config.name) or imported("data.name", config.name, "package.module:SPEC")
    if not isinstance(spec, DatasetSpec):
        raise UserError(
            f"data.name={config.name!r} is {type(spec).__name__}, expected a DatasetSpec "
            "(flow_jax/data/image_datasets.py): name another."
        )
    return spec


def shape(config: ConfigDict) -> tuple[int, int, int]:
    """Returns side, channels and number of grey values, without opening the data.

    Raises:
      UserError: the config gives no size, or one that the data do not have.
    """
    spec = _spec(config)
    size, channels = config.image_size or spec.size, config.channels or spec.channels or 3
    for name, value, own in (("image_size", size, spec.size), ("channels", channels, spec.channels)):
        if own not in (None, value):
            raise UserError(f"data.{name} is {value}, but {config.name} have {own}: set it to None.")
    if size is None:
        raise UserError("data.image_size is None, expected the side of the images in pixels: set it.")
    # The config was checked, but not the sizes of a user's DatasetSpec.
    check_values(declared(ImageDataKeys, "data."), {"data.image_size": size, "data.channels": channels})
    return size, channels, spec.levels


def known_classes(config: ConfigDict) -> int | None:
    """Returns the number of classes, 0 without labels; None if it is not known without opening the data."""
    if not config.conditional:
        return 0
    return config.num_classes or _spec(config).num_classes


def open_data(config: ConfigDict) -> ImageData:
    """Opens both splits; images are decoded later, when they are read.

    Raises:
      UserError: the data do not exist or do not match the config.
    """
    size, channels, levels = shape(config)
    spec = _spec(config)
    check_arguments(f"data.name={config.name!r}: its open", spec.open, "config", "size", "channels")
    splits = spec.open(config, size, channels)
    if not isinstance(splits, Splits):
        raise UserError(
            f"data.name={config.name!r} opened {type(splits).__name__}, expected Splits "
            "(flow_jax/data/image_datasets.py): correct its open."
        )
    if config.conditional:
        if not splits.classes:
            raise UserError(
                f"{config.folder} has no labels, expected class folders: sort the files into folders, or train without "
                "labels: data.conditional=False."
            )
        if config.num_classes not in (None, len(splits.classes)):
            raise UserError(
                f"data.num_classes is {config.num_classes}, but the data have {len(splits.classes)} classes: correct "
                "it."
            )
    num_classes = len(splits.classes) if config.conditional else 0
    scores = spec.scores if config.conditional else tuple
    return ImageData(splits.train, splits.held_out, size, channels, levels, num_classes, scores)


def read(
    images: ImageSet, rows: Int[np.ndarray, " N"], bad_rows: BadRows, threads: int = 2
) -> Iterator[tuple[UInt8[np.ndarray, "n I I C"], Int[np.ndarray, " n"]]]:
    """Yields images and labels of the given rows in batches, in order, without bad rows, which are counted.

    Raises:
      UserError: as `BadRows`.
    """

    def read_one(row):
        try:
            return images[row]
        except UserError as error:
            bad_rows.skip(row, images.name(row), error)
            return None

    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for start in range(0, len(rows), _READ):
            numbers = [int(row) for row in rows[start : start + _READ]]
            batch = list(pool.map(read_one, numbers))
            bad_rows.count(numbers, [image is None for image in batch], images.name)
            good = [image for image in batch if image is not None]
            if good:
                yield np.stack([i.pixels for i in good]), np.array([i.label for i in good], np.int32)
    bad_rows.check()


def _digits(config: ConfigDict, size: int, channels: int) -> Splits:
    train, held_out = (ArrayImages(*digits.load(split)) for split in ("train", "held_out"))
    return Splits(train, held_out, [str(digit) for digit in range(digits.CLASSES)])


def _shapes(config: ConfigDict, size: int, channels: int) -> Splits:
    number = config.num_examples
    train = synthetic_images.ShapeImages("train", number, size, channels)
    return Splits(
        train,
        synthetic_images.ShapeImages("held_out", max(number // 10, 2), size, channels),
        synthetic_images.CLASSES,
    )


def _folder(config: ConfigDict, size: int, channels: int) -> Splits:
    whole = FolderImages(_path(config), size, channels, cache_dir())
    if config.held_out_folder is not None:
        held_out = FolderImages(config.held_out_folder, size, channels, cache_dir())
        if held_out.classes != whole.classes:
            raise UserError(
                f"{config.held_out_folder} has other class folders than {config.folder} "
                f"({len(held_out.classes)} and {len(whole.classes)}), expected the same: correct data.held_out_folder."
            )
        return Splits(whole, held_out, whole.classes)
    number = round(config.held_out_fraction * len(whole))
    if not 2 <= number < len(whole):
        raise UserError(
            f"data.held_out_fraction={config.held_out_fraction} of {len(whole)} images holds out {number}, expected at "
            "least 2 and not all: change it, or set data.held_out_folder."
        )
    mask = _held_out(whole.identity, number)
    return Splits(ImageSubset(whole, np.flatnonzero(~mask)), ImageSubset(whole, np.flatnonzero(mask)), whole.classes)


def _held_out(identity: Int[np.ndarray, " N"], number: int) -> Bool[np.ndarray, " N"]:
    """Returns a mask of the held-out images: distinct images in random order, each with its copies, up to `number`."""
    copies = np.bincount(identity)
    order = np.argsort(np.random.PCG64(_SPLIT).random_raw(len(copies)), kind="stable")
    distinct = np.searchsorted(np.cumsum(copies[order]), number) + 1
    mask = np.isin(identity, order[:distinct])
    if mask.all():
        raise UserError(
            f"the folder contains {len(copies)} different image(s) among {len(mask)} files, expected enough for a "
            "training and a held-out split: add images, or set data.held_out_folder."
        )
    return mask


def _tfds(config: ConfigDict, size: int, channels: int) -> Splits:
    label = config.label if config.conditional else ""
    train, held_out = (
        TfdsImages(_path(config), split, config.image, label, size, channels)
        for split in (config.split, config.held_out)
    )
    return Splits(train, held_out, train.classes)


def _path(config: ConfigDict) -> str:
    if config.folder is None:
        raise UserError(f"data.folder is None, expected the folder of the images of data.name={config.name!r}: set it.")
    return config.folder


DATASETS = {
    "digits": DatasetSpec(_digits, 8, 1, digits.LEVELS, digits.CLASSES, lambda: [digit_scores.DigitScores()]),
    "shapes": DatasetSpec(_shapes, num_classes=len(synthetic_images.CLASSES)),
    "folder": DatasetSpec(_folder),
    "tfds": DatasetSpec(_tfds),
}
