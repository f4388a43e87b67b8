"""The pictures of a config: what to train on, what is held out, and in what shape; by the name in `data.name`."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int, UInt8
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from flow_jax.data import digit_scores, digits, synthetic_images
from flow_jax.data.image_sets import ArrayPictures, FolderPictures, Pictures, Subset, TfdsPictures
from train_jax.core.errors import UserError
from train_jax.core.files import cache_dir
from train_jax.core.import_path import check_named, imported
from train_jax.core.row_errors import BadRows

BYTES = 256  # values of a pixel
_SPLIT = 0  # seed of the split of a folder
_READ = 256  # pictures read at once


@runtime_checkable
class Score(Protocol):
    """Something to measure of samples, which come in batches."""

    def add(self, images: UInt8[np.ndarray, "N I I C"], labels: Int[np.ndarray, " N"]) -> None: ...

    def results(self) -> dict[str, float]: ...


@dataclasses.dataclass(frozen=True)
class ImageData:
    """Attributes:

    train, held_out: the two sides.
    size, channels, levels: side of a picture, 1 or 3, values that an entry has.
    num_classes: 0 where there are no labels.
    scores: makes what to measure of samples beside what is measured of all.
    row_a_label: whether pictures of samples have a row for each label; or rows of any.
    """

    train: Pictures
    held_out: Pictures
    size: int
    channels: int
    levels: int
    num_classes: int
    scores: Callable[[], Sequence[Score]] = tuple
    row_a_label: bool = True


class Splits(NamedTuple):
    """Two sides of a data set, and the names of its classes."""

    train: Pictures
    held_out: Pictures
    classes: Sequence[str]


class DatasetSpec(NamedTuple):
    """A value of `data.name`; size, channels and classes are None where the data decide or the config."""

    open: Callable[[ConfigDict, int, int], Splits]
    size: int | None = None
    channels: int | None = None
    levels: int = BYTES
    num_classes: int | None = None
    scores: Callable[[], Sequence[Score]] = tuple


def defaults() -> ConfigDict:
    """The keys of `config.data`."""
    return ConfigDict(
        {
            "name": "digits",  # digits | shapes (made up) | folder | tfds | import path of a DatasetSpec
            "folder": placeholder(str),  # of class folders or of files; of tfds the version folder
            "held_out_folder": placeholder(str),  # of folder; None: a share of `folder`
            "held_out_fraction": 0.02,  # that share
            "split": "train",  # of tfds
            "held_out": "test",
            "image": "image",  # of tfds: names of the features
            "label": "label",
            "image_size": placeholder(int),  # side; larger pictures are cut to a square and shrunk. Digits have 8
            "channels": placeholder(int),  # 1 or 3; None: 3, of digits 1
            "conditional": True,  # by label
            "num_classes": placeholder(int),  # None: as many as the data have
            "num_examples": 2000,  # of shapes
            "flip": False,  # every second picture left to right, another half in every step
            "dequantize": True,  # uniform noise of one grey value, without which there is no likelihood
        }
    )


def check_name(name: str) -> None:
    """Raises UserError for a `data.name` that is neither of `DATASETS` nor an import path."""
    check_named("data.name", name, DATASETS)


def _spec(config: ConfigDict) -> DatasetSpec:
    """What `data.name` names: of `DATASETS`, or a DatasetSpec by its import path."""
    check_name(config.name)
    return DATASETS.get(config.name) or imported("data.name", config.name, "package.module:SPEC")


def shape(config: ConfigDict) -> tuple[int, int, int]:
    """Side, channels and values of an entry, told without data.

    Raises:
      UserError: a shape that the data do not have, or none.
    """
    kind = _spec(config)
    size, channels = config.image_size or kind.size, config.channels or kind.channels or 3
    for key, found, own in (("image_size", size, kind.size), ("channels", channels, kind.channels)):
        if own not in (None, found):
            raise UserError(f"data.{key} is {found}, but {config.name} have {own}: set it to None.")
    if size is None or size < 1:
        raise UserError(f"data.image_size is {size}, expected the side of the pictures in pixels: set it.")
    if channels not in (1, 3):
        raise UserError(f"data.channels is {channels}, expected 1 (grey) or 3 (RGB): change it.")
    return size, channels, kind.levels


def known_classes(config: ConfigDict) -> int | None:
    """The number of classes, 0 for none, where it is known without data."""
    if not config.conditional:
        return 0
    return config.num_classes or _spec(config).num_classes


def open_data(config: ConfigDict) -> ImageData:
    """Opens both sides; pictures are read later, one at a time.

    Raises:
      UserError: data that are not there, or are not what the config says.
    """
    size, channels, levels = shape(config)
    kind = _spec(config)
    found = kind.open(config, size, channels)
    if config.conditional:
        if not found.classes:
            raise UserError(
                f"{config.folder} has no labels, expected class folders: sort the files into some, or train without "
                "labels: data.conditional=False."
            )
        if config.num_classes not in (None, len(found.classes)):
            raise UserError(
                f"data.num_classes is {config.num_classes}, but the data have {len(found.classes)} classes: correct it."
            )
    classes = len(found.classes) if config.conditional else 0
    scores = kind.scores if config.conditional else tuple
    return ImageData(found.train, found.held_out, size, channels, levels, classes, scores)


def read(
    pictures: Pictures, rows: Int[np.ndarray, " N"], tally: BadRows, threads: int = 2
) -> Iterator[tuple[UInt8[np.ndarray, "n I I C"], Int[np.ndarray, " n"]]]:
    """Pictures and labels of some rows in batches, in order, without the bad ones, which are counted.

    Raises:
      UserError: as `BadRows` says.
    """

    def one(row):
        try:
            return pictures[row]
        except UserError as error:
            tally.skip(row, pictures.name(row), error)
            return None

    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for start in range(0, len(rows), _READ):
            numbers = [int(row) for row in rows[start : start + _READ]]
            found = list(pool.map(one, numbers))
            tally.count(numbers, [picture is None for picture in found], pictures.name)
            good = [picture for picture in found if picture is not None]
            if good:
                yield np.stack([p.pixels for p in good]), np.array([p.label for p in good], np.int32)
    tally.check()


def _digits(config: ConfigDict, size: int, channels: int) -> Splits:
    train, held_out = (ArrayPictures(*digits.load(split)) for split in ("train", "held_out"))
    return Splits(train, held_out, [str(digit) for digit in range(digits.CLASSES)])


def _shapes(config: ConfigDict, size: int, channels: int) -> Splits:
    number = config.num_examples
    train = synthetic_images.ShapePictures("train", number, size, channels)
    return Splits(
        train,
        synthetic_images.ShapePictures("held_out", max(number // 10, 2), size, channels),
        synthetic_images.CLASSES,
    )


def _folder(config: ConfigDict, size: int, channels: int) -> Splits:
    whole = FolderPictures(_path(config), size, channels, cache_dir())
    if config.held_out_folder is not None:
        held_out = FolderPictures(config.held_out_folder, size, channels, cache_dir())
        if held_out.classes != whole.classes:
            raise UserError(
                f"{config.held_out_folder} has other class folders than {config.folder} "
                f"({len(held_out.classes)} and {len(whole.classes)}), expected the same: correct data.held_out_folder."
            )
        return Splits(whole, held_out, whole.classes)
    number = round(config.held_out_fraction * len(whole))
    if not 2 <= number < len(whole):
        raise UserError(
            f"data.held_out_fraction={config.held_out_fraction} of {len(whole)} pictures holds {number} out, expected "
            "at least 2 and not all: change it, or name a data.held_out_folder."
        )
    held = _held_out(whole.identity, number)
    return Splits(Subset(whole, np.flatnonzero(~held)), Subset(whole, np.flatnonzero(held)), whole.classes)


def _held_out(identity: Int[np.ndarray, " N"], number: int) -> Bool[np.ndarray, " N"]:
    """Which pictures to hold out: of different ones in an order of chance, each with its copies, until `number` are."""
    times = np.bincount(identity)
    order = np.argsort(np.random.PCG64(_SPLIT).random_raw(len(times)), kind="stable")
    enough = np.searchsorted(np.cumsum(times[order]), number) + 1
    held = np.isin(identity, order[:enough])
    if held.all():
        raise UserError(
            f"the folder holds {len(times)} different picture(s) among {len(held)} files, expected enough to train on "
            "some and hold out others: add pictures, or name a data.held_out_folder."
        )
    return held


def _tfds(config: ConfigDict, size: int, channels: int) -> Splits:
    label = config.label if config.conditional else ""
    train, held_out = (
        TfdsPictures(_path(config), split, config.image, label, size, channels)
        for split in (config.split, config.held_out)
    )
    return Splits(train, held_out, train.classes)


def _path(config: ConfigDict) -> str:
    if config.folder is None:
        raise UserError(f"data.folder is None, expected where the pictures of data.name={config.name!r} lie: set it.")
    return config.folder


DATASETS = {
    "digits": DatasetSpec(_digits, 8, 1, digits.LEVELS, digits.CLASSES, lambda: [digit_scores.DigitScores()]),
    "shapes": DatasetSpec(_shapes, num_classes=len(synthetic_images.CLASSES)),
    "folder": DatasetSpec(_folder),
    "tfds": DatasetSpec(_tfds),
}
