"""Which files of a folder are pictures: the one list of endings and the one way down the folders, for every reader.

root/cats/1.png           a picture of the class "cats"
root/cats/more/2.png      another: folders within a class folder belong to it
root/3.png                a picture of no class
root/.cache/4.png         hidden, as is whatever begins with a dot: left out
root/cats/notes.txt       left out
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from absl import logging

from train_jax.core.errors import quoted

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
_HIDDEN, _OTHER = "hidden", "without an ending of pictures"
_LOOP, _CLOSED = "in a folder that links lead back to", "that cannot be opened"


class Found(NamedTuple):
    """What lies below a folder; paths are relative to it, with forward slashes, in the order of their names.

    Attributes:
      classes: pictures by the folder right below that they lie in; a folder without any is none.
      loose: pictures beside these folders.
      left_out: what is no picture that could be read, by the reason; of a hidden folder the folder alone.
    """

    classes: Mapping[str, list[str]]
    loose: list[str]
    left_out: Mapping[str, list[str]]


def pictures_below(root: str | Path) -> Found:
    """Looks through a folder, links followed; what is left out is logged in one line. Of no folder nothing is found."""
    root, left_out = Path(root), {}
    found = sorted(_below(root, "", left_out, (os.path.realpath(root),))) if root.is_dir() else []
    classes: dict[str, list[str]] = {}
    for path in found:
        if "/" in path:
            classes.setdefault(path.partition("/")[0], []).append(path)
    if left_out:
        parts = (f"{len(names)} {reason} (first: {quoted(min(names))})" for reason, names in left_out.items())
        logging.warning("Of %s is left out: %s.", root, ", ".join(parts))
    return Found(dict(sorted(classes.items())), [path for path in found if "/" not in path], left_out)


def _is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder or a link to one; what leads nowhere, or to itself, is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _below(root: Path, folder: str, left_out: dict[str, list[str]], above: tuple[str, ...]) -> list[str]:
    """Pictures below root/folder; `above` are the folders that lead there, of which a link may be to one."""
    try:
        entries = list(os.scandir(root / folder))
    except OSError:
        left_out.setdefault(_CLOSED, []).append(folder)
        return []
    found = []
    for entry in entries:
        path = f"{folder}{entry.name}"
        if entry.name.startswith("."):
            left_out.setdefault(_HIDDEN, []).append(path)
        elif _is_folder(entry):
            real = os.path.realpath(entry.path)
            if real in above:
                left_out.setdefault(_LOOP, []).append(path)
            else:
                found += _below(root, f"{path}/", left_out, (*above, real))
        elif entry.name.lower().endswith(ENDINGS):
            found.append(path)
        else:
            left_out.setdefault(_OTHER, []).append(path)
    return found
