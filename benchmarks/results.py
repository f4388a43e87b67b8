"""Results of benchmark cases: one JSON file a suite, printed as one table with commit, versions and machine."""

import dataclasses
import json
import math
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from train_jax.core import files

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jax", "jaxlib", "flax", "libtpu", "torch", "transformers", "peft")
AIM_SIGNS = {"at most": float.__le__, "at least": float.__ge__}


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One number of a case.

    Attributes:
      name: what was measured.
      value: in `unit`.
      unit: as printed.
      aim: what it should be, such as "at most 1.3" or "at least 50"; empty if there is none.
    """

    name: str
    value: float
    unit: str
    aim: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the aim is met; None without an aim, or if nothing was measured (NaN)."""
        for words, holds in AIM_SIGNS.items():
            if self.aim.startswith(words) and not math.isnan(self.value):
                return holds(float(self.value), float(self.aim.removeprefix(words)))
        return None


def environment() -> dict[str, Any]:
    """Returns the commit, the machine and the versions of packages."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    devices = jax.devices()
    return {
        "commit": os.environ.get("BENCHMARK_COMMIT") or git.stdout.strip() or "unknown",
        "machine": f"{len(devices)} x {devices[0].device_kind}, {os.cpu_count()} CPU cores, Python "
        f"{platform.python_version()}",
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def load(file: Path) -> dict[str, Any]:
    """Returns the results by case; empty if the file does not exist."""
    return json.loads(file.read_text()) if file.is_file() else {}


def add(file: Path, case: str, entry: dict[str, Any]) -> None:
    """Stores the results of a case in the file, beside those of other cases."""
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(file, json.dumps(load(file) | {case: entry}, indent=1))


def table(results: dict[str, Any], cases: list[str]) -> str:
    """Returns a Markdown table of the results of some cases, with the environments they were measured in."""
    rows = ["| case | measured | | aim | |", "|---|---|---|---|---|"]
    environments: dict[str, str] = {}
    for case in cases:
        entry = results.get(case)
        if entry is None:
            rows.append(f"| {case} | not run | | | |")
            continue
        if "error" in entry:
            rows.append(f"| {case} | failed: {entry['error']} | | | |")
            continue
        versions = ", ".join(f"{name} {number}" for name, number in entry["versions"].items())
        text = f"commit {entry['commit']}, {entry['machine']}, {versions}"
        mark = environments.setdefault(text, chr(ord("a") + len(environments)))
        for values in entry["measurements"]:
            one = Measurement(**values)
            met = {None: "", True: "met", False: "missed"}[one.met]
            rows.append(f"| {case} ({mark}): {one.name} | {one.value:.4g} | {one.unit} | {one.aim} | {met} |")
    notes = [f"{mark}: {text}" for text, mark in environments.items()]
    return "\n".join([*rows, "", *notes])
