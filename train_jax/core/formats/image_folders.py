"""Finds the image files in a folder of class folders.

root/cats/1.png           an image of the class "cats"
root/cats/more/2.png      another: folders in a class folder belong to the class
root/3.png                an image without a class
root/.cache/4.png         left out: hidden, like every name that begins with a dot
root/cats/notes.txt       left out: not an image
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from absl import logging

from train_jax.core.errors import quoted

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
_HIDDEN, _OTHER = "hidden", "without an image extension"
_LOOP, _UNREADABLE = "linked to a parent folder", "that cannot be opened"


class ImageFiles(NamedTuple):
    """The image files below a folder, as sorted relative paths with forward slashes.

    Attributes:
      classes: images by class folder, for class folders with images.
      loose: images directly in the folder.
      left_out: other paths, by the reason; a hidden folder counts as one path.
    """

    classes: Mapping[str, list[str]]
    loose: list[str]
    left_out: Mapping[str, list[str]]


def find_images(root: str | Path) -> ImageFiles:
    """Finds the images below a folder, following links, and logs in one line what it leaves out.

    If there is no such folder, there are no images.
    """
    root = Path(root)
    left_out: dict[str, list[str]] = {}
    images = sorted(_images_below(root, "", left_out, (os.path.realpath(root),))) if root.is_dir() else []
    classes: dict[str, list[str]] = {}
    for path in images:
        if "/" in path:
            classes.setdefault(path.partition("/")[0], []).append(path)
    if left_out:
        parts = (f"{len(names)} {reason} (first: {quoted(min(names))})" for reason, names in left_out.items())
        logging.warning("%s: left out %s.", root, ", ".join(parts))
    return ImageFiles(dict(sorted(classes.items())), [path for path in images if "/" not in path], left_out)


def _is_folder(entry: os.DirEntry) -> bool:
    """Returns whether an entry is a folder or a link to one; False for a broken link or a link to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _images_below(root: Path, folder: str, left_out: dict[str, list[str]], parents: tuple[str, ...]) -> list[str]:
    """Returns the images below root/folder; `parents` are the real paths of its parents, to detect circular links."""
    try:
        entries = list(os.scandir(root / folder))
    except OSError:
        left_out.setdefault(_UNREADABLE, []).append(folder)
        return []
    images = []
    for entry in entries:
        path = f"{folder}{entry.name}"
        if entry.name.startswith("."):
            left_out.setdefault(_HIDDEN, []).append(path)
        elif _is_folder(entry):
            real = os.path.realpath(entry.path)
            if real in parents:
                left_out.setdefault(_LOOP, []).append(path)
            else:
                images += _images_below(root, f"{path}/", left_out, (*parents, real))
        elif entry.name.lower().endswith(ENDINGS):
            images.append(path)
        else:
            left_out.setdefault(_OTHER, []).append(path)
    return images
