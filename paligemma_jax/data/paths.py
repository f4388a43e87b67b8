"""Paths that a data file names: they stay within the folder they are given."""

import os
from pathlib import Path


def inside(folder: Path, name: str) -> bool:
    """Whether the file `name` of a folder lies within it, links followed; `folder` is resolved already.

    A name that no file can have (too long, a circle of links) is judged as it is written: nothing will be read there.
    """
    return "\0" not in name and Path(os.path.realpath(folder / name)).is_relative_to(folder)
