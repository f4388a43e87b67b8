"""Image files in a folder for each class, and their division into splits by a seed."""

from pathlib import Path

from absl import logging

from paligemma_jax.data.few_shot.coop import is_coop, read_coop
from paligemma_jax.data.few_shot.dataset import Example, FewShot, drawing_order
from paligemma_jax.data.paths import inside
from train_jax.core import digests
from train_jax.core.errors import UserError, quoted
from train_jax.core.image_folders import ENDINGS, find_images

SHARES = (0.5, 0.2)  # of a class's images for training and validation, as CoOp divides what comes undivided


def class_folders(folder: str | Path) -> dict[str, list[Path]]:
    """The image files of a folder of class folders, by class; both in the order of their names.

    What is left out (hidden names, files that are no images or lie in no class folder) is logged, see
    train_jax.core.image_folders.

    Raises:
      UserError: fewer than two folders with images, or two of one class.
    """
    root = Path(folder).expanduser()
    below = find_images(root)
    if below.loose:
        logging.warning("Of %s is left out: %d in no class folder (first: %s).", root, len(below.loose), below.loose[0])
    found: dict[str, list[Path]] = {}
    folders: dict[str, str] = {}
    for place, files in below.classes.items():
        name = place.replace("_", " ")
        if name in found:
            raise UserError(
                f"{folder} holds {folders[name]!r} and {place!r}, both of the class {name!r}, expected one folder a "
                "class: move their images into one."
            )
        found[name], folders[name] = [root / file for file in files], place
    if len(found) < 2:
        raise UserError(
            f"{folder} holds {len(found)} folder(s) with images ({', '.join(ENDINGS)}), expected one a class, two at "
            "least: correct the path."
        )
    return found


def read_class_folders(
    folder: str | Path, seed: int = 0, shares: tuple[float, float] = SHARES, cache: str | Path | None = None
) -> FewShot:
    """A folder of class folders, each divided into train, val and test by seed and class; copies stay together.

    Args:
      folder: see `class_folders`.
      seed: of the division; `coop.write_split_file` stores it.
      shares: of a class's images that go to train and val, rounded; the rest is test. Train and test get one at least.
      cache: folder that keeps digests of the images, by which copies are known; None computes them anew.

    Raises:
      UserError: as `class_folders`, and for a class of one image (or of copies of one), an image outside the folder (by
        a link), or shares that leave nothing for the test.
    """
    if min(shares) < 0 or not shares[0] or not sum(shares) < 1:
        raise UserError(f"the shares of train and val are {shares}, expected a sum below 1 and the first above 0.")
    root, splits = Path(folder).expanduser(), {"train": [], "val": [], "test": []}
    found, whole = class_folders(root), root.resolve()
    every = [file for files in found.values() for file in files]
    away = next((path for path in (file.relative_to(root).as_posix() for file in every) if not inside(whole, path)), "")
    if away:
        raise UserError(
            f"the image path {quoted(away)} leaves {folder} by a link, expected one within: copy the image there."
        )
    place = digests.place_of(cache, "folder", str(whole))
    numbers = iter(digests.numbers(digests.keys(digests.of_files(every, place, "images"))).tolist())
    split_of: dict[int, str] = {}  # by the number of a picture, which may have copies, perhaps in other classes
    for label, (name, files) in enumerate(found.items()):
        pictures = [next(numbers) for _ in files]
        split_of = _divided(list(dict.fromkeys(pictures)), name, folder, seed, shares) | split_of
        for file, picture in zip(files, pictures, strict=True):
            splits[split_of[picture]].append(Example(file.relative_to(root).as_posix(), label))
    return FewShot(whole.name, root, tuple(found), {name: tuple(sorted(rows)) for name, rows in splits.items()})


def _divided(pictures: list[int], name: str, folder, seed: int, shares: tuple[float, float]) -> dict[int, str]:
    """The split of each of a class's pictures. Raises UserError for a single one."""
    if len(pictures) < 2:
        raise UserError(f"the class {name!r} of {folder} has one image, expected two at least: add images.")
    train = min(max(1, round(shares[0] * len(pictures))), len(pictures) - 1)
    val = min(round(shares[1] * len(pictures)), len(pictures) - train - 1)
    order = drawing_order(seed, f"split/{name}", len(pictures))
    splits = ["train"] * train + ["val"] * val + ["test"] * (len(pictures) - train - val)
    return {pictures[number]: split for number, split in zip(order, splits, strict=True)}


def open_images(folder: str | Path, seed: int = 0, cache: str | Path | None = None) -> FewShot:
    """A data set in CoOp's layout where its split file is there, else a folder of class folders. Raises UserError."""
    return read_coop(folder, cache=cache) if is_coop(folder) else read_class_folders(folder, seed, cache=cache)
