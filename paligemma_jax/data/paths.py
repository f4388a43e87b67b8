"""Checks that paths which a data file names stay within its folder."""

import os
from pathlib import Path


def inside(folder: Path, name: str) -> bool:
    """Returns whether the file `name` of a folder is within it, links followed; `folder` must be resolved.

    A name that no file can have (too long, a circle of links) is compared as written: it will not be read.
    """
    return "\0" not in name and Path(os.path.realpath(folder / name)).is_relative_to(folder)
