"""Reads image files in one folder per class, and divides them into splits by a seed."""

from pathlib import Path

from absl import logging

from paligemma_jax.data.few_shot.coop import is_coop, read_coop
from paligemma_jax.data.few_shot.dataset import Example, FewShot, drawing_order
from paligemma_jax.data.paths import inside
from train_jax.core import digests
from train_jax.core.errors import UserError, quoted
from train_jax.core.formats.image_folders import ENDINGS, find_images

SHARES = (0.5, 0.2)  # of a class's images for training and validation, as CoOp divides data without splits


def class_folders(folder: str | Path) -> dict[str, list[Path]]:
    """Returns the image files of a folder of class folders, by class; both sorted by name.

    Skipped files (hidden names, files that are no images or are in no class folder) are logged, see
    train_jax.core.formats.image_folders.

    Raises:
      UserError: fewer than two folders with images, or two of one class.
    """
    root = Path(folder).expanduser()
    below = find_images(root)
    if below.loose:
        logging.warning("Skipped in %s: %d in no class folder (first: %s).", root, len(below.loose), below.loose[0])
    classes: dict[str, list[Path]] = {}
    folders: dict[str, str] = {}
    for class_folder, files in below.classes.items():
        name = class_folder.replace("_", " ")
        if name in classes:
            raise UserError(
                f"{folder} holds {folders[name]!r} and {class_folder!r}, both of the class {name!r}, expected one "
                "folder per class: move their images into one."
            )
        classes[name], folders[name] = [root / file for file in files], class_folder
    if len(classes) < 2:
        raise UserError(
            f"{folder} holds {len(classes)} folder(s) with images ({', '.join(ENDINGS)}), expected one per class, two "
            "at least: correct the path."
        )
    return classes


def read_class_folders(
    folder: str | Path, seed: int = 0, shares: tuple[float, float] = SHARES, cache: str | Path | None = None
) -> FewShot:
    """Returns a folder of class folders, each divided into train, val and test by seed and class.

    Copies of an image are always in the same split.

    Args:
      folder: see `class_folders`.
      seed: of the division; `coop.write_split_file` stores the division.
      shares: of a class's images for train and val, rounded; the others are for test. Train and test get at least one.
      cache: folder that stores digests of the images, by which copies are found; None computes them every time.

    Raises:
      UserError: as `class_folders`, and for a class with one image (or copies of one), an image outside the folder (by
        a link), or shares that leave nothing for the test.
    """
    if min(shares) < 0 or not shares[0] or not sum(shares) < 1:
        raise UserError(f"the shares of train and val are {shares}, expected a sum below 1 and the first above 0.")
    root, splits = Path(folder).expanduser(), {"train": [], "val": [], "test": []}
    classes, resolved = class_folders(root), root.resolve()
    files_of_all = [file for files in classes.values() for file in files]
    paths = (file.relative_to(root).as_posix() for file in files_of_all)
    outside = next((path for path in paths if not inside(resolved, path)), None)
    if outside is not None:
        raise UserError(
            f"the image path {quoted(outside)} leaves {folder} by a link, expected one within: copy the image there."
        )
    cache_file = digests.cache_file_of(cache, "folder", str(resolved))
    numbers = iter(digests.numbers(digests.keys(digests.of_files(files_of_all, cache_file, "images"))).tolist())
    split_of: dict[int, str] = {}  # by image number, which copies share, perhaps in other classes
    for label, (name, files) in enumerate(classes.items()):
        images = [next(numbers) for _ in files]
        split_of = _divided(list(dict.fromkeys(images)), name, folder, seed, shares) | split_of
        for file, image in zip(files, images, strict=True):
            splits[split_of[image]].append(Example(file.relative_to(root).as_posix(), label))
    return FewShot(resolved.name, root, tuple(classes), {name: tuple(sorted(rows)) for name, rows in splits.items()})


def _divided(images: list[int], name: str, folder, seed: int, shares: tuple[float, float]) -> dict[int, str]:
    """Returns the split of each of a class's images. Raises UserError for a single image."""
    if len(images) < 2:
        raise UserError(f"the class {name!r} of {folder} has one image, expected two at least: add images.")
    train = min(max(1, round(shares[0] * len(images))), len(images) - 1)
    val = min(round(shares[1] * len(images)), len(images) - train - 1)
    order = drawing_order(seed, f"split/{name}", len(images))
    splits = ["train"] * train + ["val"] * val + ["test"] * (len(images) - train - val)
    return {images[number]: split for number, split in zip(order, splits, strict=True)}


def open_images(folder: str | Path, seed: int = 0, cache: str | Path | None = None) -> FewShot:
    """Opens a data set in CoOp's layout if it has a split file, else a folder of class folders. Raises UserError."""
    return read_coop(folder, cache=cache) if is_coop(folder) else read_class_folders(folder, seed, cache=cache)
