"""Image data sets in the layout of CoOp (Zhou et al. 2022): a folder of images beside a published split file.

caltech-101/101_ObjectCategories/...            the images
caltech-101/split_zhou_Caltech101.json          {"train": [["accordion/image_0001.jpg", 3, "accordion"], ...],
                                                 "val": [...], "test": [...]}
"""

import json
from pathlib import Path
from typing import Any

from paligemma_jax.data.few_shot import SPLITS, Example, FewShot
from paligemma_jax.data.paths import inside
from train_jax.errors import UserError

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
"""Where each data set has its images."""
TEMPLATES = {
    "OxfordPets": "a photo of a {}, a type of pet.",
    "OxfordFlowers": "a photo of a {}, a type of flower.",
    "DescribableTextures": "a photo of a {}, a type of texture.",
    "EuroSAT": "a centered satellite photo of {}.",
    "Food101": "a photo of {}, a type of food.",
    "UCF101": "a photo of a person doing {}.",
}
"""Hand-written prompts of CLIP and CoOp for zero-shot classification; of the others "a photo of a {}.", which CoPrompt
gives all its classes (its code makes these too, and does not use them)."""


def is_coop(folder: str | Path) -> bool:
    """Whether a split file lies in the folder."""
    return any(Path(folder).expanduser().glob(f"{PREFIX}*.json"))


def read_coop(folder: str | Path, images: str | None = None) -> FewShot:
    """A data set by its split file; class names with spaces for underscores.

    Args:
      folder: holds exactly one split_zhou_NAME.json.
      images: folder within it that the file's paths are relative to; None: the published one of NAME, else "images"
        where there is one, else `folder`, as `write_split_file` leaves class folders.

    Raises:
      UserError: no split file or several, no images, or a file that is not as above, names paths outside, gives a
        label two names, or has an image twice.
    """
    folder = Path(folder).expanduser()
    files = sorted(folder.glob(f"{PREFIX}*.json"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or f"no {PREFIX}NAME.json"
        raise UserError(f"{folder} holds {found}, expected one split file: add it, or remove the others.")
    name = files[0].stem.removeprefix(PREFIX)
    root = folder / (images or IMAGES.get(name, "images"))
    if images is None and name not in IMAGES and not root.is_dir():
        root = folder
    if not root.is_dir():
        raise UserError(f"{root} is no folder, expected the images of {files[0].name}: put them there.")
    return FewShot(name, root, *_examples(files[0], root.resolve()))


def _examples(file: Path, root: Path) -> tuple[tuple[str, ...], dict[str, tuple[Example, ...]]]:
    """Class names by label, and the examples of every split."""
    names: dict[int, str] = {}
    splits = {}
    for split, rows in _rows(file).items():
        for image, label, name in rows:
            if names.setdefault(label, name) != name:
                raise UserError(
                    f"{file} calls label {label} {names[label]!r} and {name!r}, expected one name: mend it."
                )
            if not inside(root, image):
                raise UserError(f"{file}: the image path {image!r} leaves {root.name}, expected one within: mend it.")
        splits[split] = tuple(Example(image, label) for image, label, _ in rows)
    if sorted(names) != list(range(len(names))):
        raise UserError(
            f"{file} has {len(names)} labels from {min(names)} to {max(names)}, expected all from 0: mend it."
        )
    return tuple(names[label].replace("_", " ") for label in range(len(names))), splits


def _rows(file: Path) -> dict[str, list[tuple[str, int, str]]]:
    """The file as it stands, checked for its types."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}), expected a split file: fetch it again.") from None
    if not isinstance(content, dict) or not all(isinstance(content.get(split, []), list) for split in SPLITS):
        raise UserError(f"{file} holds no object with the lists {', '.join(SPLITS)}: fetch it again.")
    rows = {split: content.get(split, []) for split in SPLITS}
    wrong = next((row for split in SPLITS for row in rows[split] if not _is_row(row)), None)
    if wrong is not None or not any(rows.values()):
        found = f"the row {str(wrong)[:80]}" if wrong is not None else "no rows"
        raise UserError(f"{file} has {found}, expected rows [path, label, class name]: fetch it again.")
    return rows


def _is_row(row: Any) -> bool:
    kinds = (str, int, str)
    return isinstance(row, list) and len(row) == 3 and all(type(v) is kind for v, kind in zip(row, kinds, strict=True))


def write_split_file(data: FewShot, folder: str | Path) -> Path:
    """Writes the splits of a data set to split_zhou_NAME.json of its root, or of what holds that, for `read_coop`."""
    rows = {
        split: [[image, label, data.classes[label]] for image, label in examples]
        for split, examples in data.splits.items()
    }
    file = Path(folder) / f"{PREFIX}{data.name}.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file
