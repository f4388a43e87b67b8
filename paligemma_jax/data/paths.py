"""Paths that a data file names: they stay within the folder they are given."""

from pathlib import Path


def inside(folder: Path, name: str) -> bool:
    """Whether the file `name` of a folder lies within it, links followed; `folder` is resolved already."""
    return "\0" not in name and (folder / name).resolve().is_relative_to(folder)
