"""Image files in a folder for each class, and their division into splits by a seed."""

from pathlib import Path

from paligemma_jax.data.coop import is_coop, read_coop
from paligemma_jax.data.few_shot import Example, FewShot, drawing_order
from paligemma_jax.data.paths import inside
from train_jax.errors import UserError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SHARES = (0.5, 0.2)  # of a class's images for training and validation, as CoOp divides what comes undivided


def class_folders(folder: str | Path) -> dict[str, list[Path]]:
    """The image files of a folder of class folders, by class; both in the order of their names.

    Folders and files whose names begin with a dot are left out.

    Raises:
      UserError: fewer than two folders with images, or two of one class.
    """
    root = Path(folder).expanduser()
    found: dict[str, list[Path]] = {}
    for place in _shown(root):
        files = [file for file in _shown(place) if file.suffix.lower() in ENDINGS]
        name = place.name.replace("_", " ")
        if files and name in found:
            raise UserError(
                f"{folder} holds {found[name][0].parent.name!r} and {place.name!r}, both of the class {name!r}, "
                "expected one folder a class: move their images into one."
            )
        if files:
            found[name] = files
    if len(found) < 2:
        raise UserError(
            f"{folder} holds {len(found)} folder(s) with images ({', '.join(ENDINGS)}), expected one a class, two at "
            "least: correct the path."
        )
    return found


def _shown(folder: Path) -> list[Path]:
    """What a folder holds, sorted, but for what editors and systems hide there; of anything else nothing."""
    return sorted(place for place in folder.iterdir() if not place.name.startswith(".")) if folder.is_dir() else []


def read_class_folders(folder: str | Path, seed: int = 0, shares: tuple[float, float] = SHARES) -> FewShot:
    """A folder of class folders, each divided into train, val and test by seed and class.

    Args:
      folder: see `class_folders`.
      seed: of the division; `coop.write_split_file` stores it.
      shares: of a class's images that go to train and val, rounded; the rest is test. Train and test get one at least.

    Raises:
      UserError: as `class_folders`, and for a class of one image, an image outside the folder (by a link), or shares
        that leave nothing for the test.
    """
    if min(shares) < 0 or not shares[0] or not sum(shares) < 1:
        raise UserError(f"the shares of train and val are {shares}, expected a sum below 1 and the first above 0.")
    root, splits = Path(folder).expanduser(), {"train": [], "val": [], "test": []}
    found, whole = class_folders(root), root.resolve()
    for label, (name, files) in enumerate(found.items()):
        if len(files) < 2:
            raise UserError(f"the class {name!r} of {folder} has one image, expected two at least: add images.")
        train = min(max(1, round(shares[0] * len(files))), len(files) - 1)
        val = min(round(shares[1] * len(files)), len(files) - train - 1)
        for place, number in enumerate(drawing_order(seed, f"split/{name}", len(files))):
            split = "train" if place < train else "val" if place < train + val else "test"
            path = files[number].relative_to(root).as_posix()
            if not inside(whole, path):
                raise UserError(
                    f"the image path {path!r} leaves {folder} by a link, expected one within: copy the image there."
                )
            splits[split].append(Example(path, label))
    return FewShot(whole.name, root, tuple(found), {name: tuple(sorted(rows)) for name, rows in splits.items()})


def open_images(folder: str | Path, seed: int = 0) -> FewShot:
    """A data set in CoOp's layout where its split file is there, else a folder of class folders. Raises UserError."""
    return read_coop(folder) if is_coop(folder) else read_class_folders(folder, seed)
