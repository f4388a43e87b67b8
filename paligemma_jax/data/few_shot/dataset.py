"""Images of named classes, and random few-shot subsets of them. Axes: C classes.

The images drawn of a class are a function of the seed and of the class's own images, so they depend neither on the
other classes nor on the order of a file; fewer shots are contained in more.
"""

import dataclasses
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from paligemma_jax.data.records import fingerprint_of
from paligemma_jax.data.row_texts import is_text
from train_jax.core.errors import UserError, quoted

SPLITS = ("train", "val", "test")
ALL, BASE, NOVEL = "all", "base", "novel"
MAX_VAL_SHOTS = 4  # of a class, as in CoOp


class Example(NamedTuple):
    """An image file, relative to the root of its data set and with forward slashes, and the number of its class."""

    image: str
    label: int


@dataclasses.dataclass(frozen=True)
class FewShot:
    """A data set of images by class; a label is a position in `classes`.

    Attributes:
      name: of the data set.
      root: folder that the images' paths are relative to.
      classes: C names, as used in prompts.
      splits: examples of "train", "val" and "test"; a missing split is empty.
      shots: largest number of training images per class; None: all.
      seed: of the drawing; None if nothing was drawn.
      part: "all" of the data set's classes, the "base" ones or the "novel" ones.

    Raises:
      UserError: two classes of one name, a label without a class, an image twice, or a path that leaves the root.
    """

    name: str
    root: Path
    classes: tuple[str, ...]
    splits: Mapping[str, tuple[Example, ...]]
    shots: int | None = None
    seed: int | None = None
    part: str = ALL

    def __post_init__(self):
        object.__setattr__(self, "splits", {split: tuple(self.splits.get(split, ())) for split in SPLITS})
        _check_classes(self.name, self.classes)
        examples = [example for split in SPLITS for example in self.splits[split]]
        _check_examples(self.name, examples, len(self.classes))

    def few_shot(self, shots: int, seed: int) -> "FewShot":
        """Returns the data set with `shots` training images per class (all of a class with fewer), drawn by seed.

        As in CoOp (Zhou et al. 2022) validation gets min(shots, 4) images per class, and the test split stays whole.

        Raises:
          UserError: no shots, a set that is already drawn, or a class without a training image.
        """
        if shots < 1 or self.shots is not None:
            raise UserError(
                f"{shots} shots of {self.name} with {self.shots or 'all'} images a class were asked for, expected at "
                "least one, of a whole data set: change the shots."
            )
        without = set(range(len(self.classes))) - {example.label for example in self.splits["train"]}
        if without:
            raise UserError(
                f"{len(without)} of {len(self.classes)} classes of {self.name} have no training image (first: "
                f"{quoted(self.classes[min(without)])}), expected one at least: add images, or leave out the classes."
            )
        drawn = {
            split: self._drawn(split, count, seed)
            for split, count in (("train", shots), ("val", min(shots, MAX_VAL_SHOTS)))
        }
        return dataclasses.replace(self, splits={**self.splits, **drawn}, shots=shots, seed=seed)

    def base_to_novel(self) -> tuple["FewShot", "FewShot"]:
        """Returns the first ceil(C / 2) classes and the others; labels count from 0 in each (CoOp's SUBSAMPLE_CLASSES).

        Raises:
          UserError: a single class, or a data set that is already one half.
        """
        if len(self.classes) < 2 or self.part != ALL:
            raise UserError(
                f"{self.name} ({self.part}) has {len(self.classes)} class(es), expected all classes of a data set, at "
                "least two, to divide into base and novel ones: give such a data set."
            )
        middle = math.ceil(len(self.classes) / 2)
        return self._part(BASE, 0, middle), self._part(NOVEL, middle, len(self.classes))

    def ordered(self, classes: Sequence[str]) -> "FewShot":
        """Returns the data set with its classes in another order, which determines the halves of `base_to_novel`.

        Raises:
          UserError: `classes` are not the names of the classes.
        """
        if sorted(classes) != sorted(self.classes):
            raise UserError(
                f"an order of {len(classes)} classes was given for the {len(self.classes)} of {self.name}, expected "
                "each of them once: correct the names."
            )
        labels = {name: label for label, name in enumerate(classes)}
        splits = {
            split: tuple(Example(image, labels[self.classes[label]]) for image, label in examples)
            for split, examples in self.splits.items()
        }
        return dataclasses.replace(self, classes=tuple(classes), splits=splits)

    def renamed(self, names: Mapping[str, str]) -> "FewShot":
        """Returns the data set with new class names, in the same order. Shots depend on the names, so they change.

        Raises:
          UserError: a class without a new name, or two of one name.
        """
        without = [name for name in self.classes if name not in names]
        if without:
            raise UserError(
                f"{len(without)} of {len(self.classes)} classes of {self.name} have no new name (first: "
                f"{quoted(without[0])}), expected one for each: add names."
            )
        return dataclasses.replace(self, classes=tuple(names[name] for name in self.classes))

    def only(self, *splits: str) -> "FewShot":
        """Returns the data set without the other splits."""
        return dataclasses.replace(self, splits={split: self.splits[split] for split in splits})

    def to_dict(self) -> dict[str, Any]:
        """Returns everything but the root as JSON values; `from_dict` is the inverse."""
        described = {"name": self.name, "part": self.part, "shots": self.shots, "seed": self.seed}
        splits = {split: [list(example) for example in examples] for split, examples in self.splits.items()}
        return described | {"classes": list(self.classes), "splits": splits}

    @classmethod
    def from_dict(cls, values: dict[str, Any], root: str | Path) -> "FewShot":
        """Reads the output of `to_dict`; images are below `root`. Raises UserError, as the class does."""
        splits = {split: tuple(Example(*example) for example in values["splits"][split]) for split in SPLITS}
        described = {key: values[key] for key in ("name", "part", "shots", "seed")}
        return cls(root=Path(root), classes=tuple(values["classes"]), splits=splits, **described)

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits: equal for the same name, classes, and examples by path, in their order."""
        return fingerprint_of(**self.to_dict())

    def _drawn(self, split: str, count: int, seed: int) -> tuple[Example, ...]:
        examples = []
        for label, images in enumerate(by_class(self.splits[split], len(self.classes))):
            order = drawing_order(seed, f"{split}/{self.classes[label]}", len(images))
            examples += [Example(images[index], label) for index in order[:count]]
        return tuple(examples)

    def _part(self, part: str, first: int, end: int) -> "FewShot":
        splits = {
            split: tuple(Example(image, label - first) for image, label in examples if first <= label < end)
            for split, examples in self.splits.items()
        }
        return dataclasses.replace(self, classes=self.classes[first:end], splits=splits, part=part)


def by_class(examples: Iterable[Example], num_classes: int) -> list[list[str]]:
    """Returns the images of each class, sorted by path."""
    images: list[list[str]] = [[] for _ in range(num_classes)]
    for image, label in examples:
        images[label].append(image)
    return [sorted(group) for group in images]


def drawing_order(seed: int, name: str, count: int) -> np.ndarray:
    """Returns a permutation of `count` items by seed and name, from numpy's raw PCG64 outputs, which are stable."""
    raw = np.random.PCG64((seed, zlib.crc32(name.encode()))).random_raw(count)
    return np.argsort(raw, kind="stable")


def _check_classes(name: str, classes: tuple[str, ...]) -> None:
    twice = [word for word, times in Counter(classes).items() if times > 1]
    if not classes or twice or not all(word.strip() and is_text(word) for word in classes):
        counted = f"{len(classes)} classes" + (f", of which {quoted(twice[0])} occurs twice" if twice else "")
        raise UserError(
            f"{name} has {counted}, expected different names, all of them text and none empty: correct the names."
        )


def _check_examples(name: str, examples: list[Example], num_classes: int) -> None:
    times = Counter(image for image, _ in examples)
    for image, label in examples:
        if not 0 <= label < num_classes:
            raise UserError(f"{name}: {image} has label {label}, expected 0 to {num_classes - 1}: correct the label.")
        path = PurePosixPath(image)
        if path.is_absolute() or ".." in path.parts or "\0" in image:
            raise UserError(
                f"{name}: the image path {quoted(image)} leaves its folder, expected one within: move the image."
            )
        if times[image] > 1:
            raise UserError(
                f"{name}: {image} occurs {times[image]} times in the splits, expected once, as no test image may be "
                "tuned on: remove all but one."
            )
