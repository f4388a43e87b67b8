"""Image data sets in the layout of CoOp (Zhou et al. 2022): a folder of images beside a published split file.

caltech-101/101_ObjectCategories/...            the images
caltech-101/split_zhou_Caltech101.json          {"train": [["accordion/image_0001.jpg", 3, "accordion"], ...],
                                                 "val": [...], "test": [...]}
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from absl import logging

from paligemma_jax.data.few_shot.dataset import SPLITS, Example, FewShot
from paligemma_jax.data.paths import inside
from paligemma_jax.data.row_texts import is_text
from train_jax.core import digests
from train_jax.core.errors import UserError, quoted

PREFIX = "split_zhou_"

IMAGES = {
    "Caltech101": "101_ObjectCategories",
    "OxfordPets": "images",
    "StanfordCars": ".",
    "OxfordFlowers": "jpg",
    "Food101": "images",
    "SUN397": "SUN397",
    "DescribableTextures": "images",
    "EuroSAT": "2750",
    "UCF101": "UCF-101-midframes",
}
"""Image folder of each data set."""
TEMPLATES = {
    "OxfordPets": "a photo of a {}, a type of pet.",
    "OxfordFlowers": "a photo of a {}, a type of flower.",
    "DescribableTextures": "a photo of a {}, a type of texture.",
    "EuroSAT": "a centered satellite photo of {}.",
    "Food101": "a photo of {}, a type of food.",
    "UCF101": "a photo of a person doing {}.",
}
"""Hand-written prompts of CLIP and CoOp for zero-shot classification; other data sets use "a photo of a {}.", as
CoPrompt does for all its classes (its code has these prompts too, but does not use them)."""


def is_coop(folder: str | Path) -> bool:
    """Returns whether a folder holds a split file."""
    return any(Path(folder).expanduser().glob(f"{PREFIX}*.json"))


def read_coop(folder: str | Path, images: str | None = None, cache: str | Path | None = None) -> FewShot:
    """Returns a data set by its split file; underscores of class names become spaces.

    Args:
      folder: holds exactly one split_zhou_NAME.json.
      images: folder within it that the file's paths are relative to; None: the published one of NAME, else "images" if
        it exists, else `folder`, as `write_split_file` leaves class folders.
      cache: folder that stores digests of the images, by which copies are found; None computes them every time.

    Raises:
      UserError: no split file or several, no images, or a file that is not as above, names paths outside, gives a
        label two names, or has an image twice, or a copy of it in another split. Copies in a published split file are
        only logged, as published numbers were measured with them.
    """
    folder = Path(folder).expanduser()
    files = sorted(folder.glob(f"{PREFIX}*.json"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or f"no {PREFIX}NAME.json"
        raise UserError(f"{folder} holds {names}, expected one split file: add it, or remove the others.")
    name = files[0].stem.removeprefix(PREFIX)
    root = folder / (images or IMAGES.get(name, "images"))
    if images is None and name not in IMAGES and not root.is_dir():
        root = folder
    if not root.is_dir():
        raise UserError(f"{root} is no folder, expected the images of {files[0].name}: put them there.")
    data = FewShot(name, root, *_examples(files[0], root.resolve()))
    _check_copies(data, files[0], cache)
    return data


def _examples(file: Path, root: Path) -> tuple[tuple[str, ...], dict[str, tuple[Example, ...]]]:
    """Returns class names by label, and the examples of every split."""
    names: dict[int, str] = {}
    splits = {}
    for split, rows in _rows(file).items():
        for image, label, name in rows:
            if names.setdefault(label, name) != name:
                raise UserError(
                    f"{file} calls label {label} {quoted(names[label])} and {quoted(name)}, expected one name: correct "
                    "it."
                )
            if not inside(root, image):
                raise UserError(
                    f"{file}: the image path {quoted(image)} leaves {root.name}, expected one within: correct it."
                )
        splits[split] = tuple(Example(image, label) for image, label, _ in rows)
    if sorted(names) != list(range(len(names))):
        raise UserError(
            f"{file} has {len(names)} labels from {min(names)} to {max(names)}, expected all from 0: correct it."
        )
    return tuple(names[label].replace("_", " ") for label in range(len(names))), splits


def _check_copies(data: FewShot, file: Path, cache: str | Path | None) -> None:
    """Looks for copies of images in two splits under different names, among files of equal size."""
    rows = [(split, image) for split, examples in data.splits.items() for image, _ in examples]
    sizes = [_size(data.root / image) for _, image in rows]
    splits_of_size = Counter(size for size, _ in {(size, split) for size, (split, _) in zip(sizes, rows, strict=True)})
    rows = [row for size, row in zip(sizes, rows, strict=True) if size and splits_of_size[size] > 1]
    cache_file = digests.cache_file_of(cache, "coop", str(file.resolve()))
    keys = digests.keys(
        digests.of_files([data.root / image for _, image in rows], cache_file, f"images of {data.name}")
    )
    first: dict[bytes, tuple[str, str]] = {}
    copies = []
    for key, (split, image) in zip(keys, rows, strict=True):
        if key is not None and first.setdefault(key, (split, image))[0] != split:
            copies.append((*first[key], split, image))
    if copies:
        one = copies[0]
        pair = f"{one[1]} of {one[0]}, {one[3]} of {one[2]}"
        fault = f"{file}: {len(copies)} image(s) are in two splits (first: {pair})"
        if data.name not in IMAGES:
            raise UserError(f"{fault}, expected test images in no other split: remove all but one of each.")
        logging.warning("%s; the published split is used unchanged.", fault)


def _size(file: Path) -> int:
    """Returns the bytes of a file, 0 if it does not exist."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _rows(file: Path) -> dict[str, list[tuple[str, int, str]]]:
    """Returns the file's rows after checking their types."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}), expected a split file: download it again.") from None
    if not isinstance(content, dict) or not all(isinstance(content.get(split, []), list) for split in SPLITS):
        raise UserError(f"{file} holds no object with the lists {', '.join(SPLITS)}: download it again.")
    rows = {split: content.get(split, []) for split in SPLITS}
    wrong = next((row for split in SPLITS for row in rows[split] if not _is_row(row)), None)
    if wrong is not None or not any(rows.values()):
        fault = f"the row {quoted(wrong)}" if wrong is not None else "no rows"
        raise UserError(f"{file} has {fault}, expected rows [path, label, class name]: download it again.")
    return rows


def _is_row(row: Any) -> bool:
    kinds = (str, int, str)
    typed = isinstance(row, list) and len(row) == 3 and all(type(v) is k for v, k in zip(row, kinds, strict=True))
    return typed and is_text(row[0]) and is_text(row[2])


def write_split_file(data: FewShot, folder: str | Path) -> Path:
    """Writes a data set's splits to split_zhou_NAME.json in its root or the root's parent, for `read_coop`."""
    rows = {
        split: [[image, label, data.classes[label]] for image, label in examples]
        for split, examples in data.splits.items()
    }
    file = Path(folder) / f"{PREFIX}{data.name}.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file
