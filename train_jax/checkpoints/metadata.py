"""The JSON of a checkpoint, read without Orbax: what a run is asked before anything is loaded.

Each step is one folder `<step>/` with `meta/meta.json` in it: {"meta": ..., "metrics": ...} as `Checkpoints.save` was
given them. A folder appears under its final name only when everything in it is written.
"""

import json
from pathlib import Path
from typing import Any

META_FILE = "meta.json"


def meta_path(folder: Path, step: int) -> Path:
    """Where the JSON of a step lies."""
    return folder / str(step) / "meta" / META_FILE


def read_json(folder: Path, step: int) -> dict[str, Any]:
    """`{"meta": ..., "metrics": ...}` of a step."""
    return json.loads(meta_path(folder, step).read_text(encoding="utf-8"))


def read_latest(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """The latest step in a `checkpoints/` folder and its `meta`; None where there is no step (or no folder)."""
    steps = [int(entry.name) for entry in folder.glob("*") if entry.name.isdigit()]
    if not steps:
        return None
    return max(steps), read_json(folder, max(steps))["meta"]
