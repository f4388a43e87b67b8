"""The JSON of a checkpoint, read without Orbax, so that a workdir can be inspected before anything is loaded.

Each step is a folder `<step>/` that contains `meta/meta.json`: {"meta": ..., "metrics": ...} as passed to
`Checkpoints.save`. A folder gets its final name only once all its files are written.
"""

import json
from pathlib import Path
from typing import Any

META_FILE = "meta.json"


def meta_path(folder: Path, step: int) -> Path:
    """Returns the path of a step's JSON file."""
    return folder / str(step) / "meta" / META_FILE


def read_metadata(folder: Path, step: int) -> dict[str, Any]:
    """Returns `{"meta": ..., "metrics": ...}` of a step."""
    return json.loads(meta_path(folder, step).read_text(encoding="utf-8"))


def read_latest(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """Returns the latest step in a `checkpoints/` folder and its `meta`, or None if there is no step or no folder."""
    steps = [int(entry.name) for entry in folder.glob("*") if entry.name.isdigit()]
    if not steps:
        return None
    return max(steps), read_metadata(folder, max(steps))["meta"]
