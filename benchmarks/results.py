"""Results of benchmark cases: one JSON file a suite, printed as one table with commit, versions and machine."""

import dataclasses
import json
import math
import os
import platform
import subprocess
from collections.abc import Collection, Sequence
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
      spread: lower and upper quartile of repeated measurements, whose median `value` is; empty for a single one.
      of: part of the case that it belongs to, such as a peer; each gets its row where cases have rows.
      needs: packages without which nothing was measured; empty if it was.
    """

    name: str
    value: float
    unit: str
    aim: str = ""
    spread: Sequence[float] = ()
    of: str = ""
    needs: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the aim is met; None without an aim, or if nothing was measured (NaN)."""
        for words, holds in AIM_SIGNS.items():
            if self.aim.startswith(words) and not math.isnan(self.value):
                return holds(float(self.value), float(self.aim.removeprefix(words)))
        return None

    @property
    def verdict(self) -> str:
        """Whether the aim is met in a word; "" without an aim, or if nothing was measured."""
        return {None: "", True: "met", False: "missed"}[self.met]

    @property
    def judgement(self) -> str:
        """The aim and whether it is met, to follow the value; "" without an aim, or if nothing was measured."""
        return f", {self.aim}: {self.verdict}" if self.verdict else ""

    def text(self, digits: int) -> str:
        """Returns the value with its spread, or what it needs."""
        if self.needs:
            return f"not run: needs {self.needs}"
        spread = " to ".join(f"{value:.{digits}g}" for value in self.spread)
        return f"{self.value:.{digits}g}" + (f" ({spread})" if spread else "")


class NotInstalledError(Exception):
    """Raised by a case that needs packages that are missing, which its message names."""


def environment() -> dict[str, Any]:
    """Returns the commit, the machine and the versions of packages."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    devices = jax.devices()
    return {
        "commit": os.environ.get("BENCHMARK_COMMIT") or git.stdout.strip() or "unknown",
        "machine": f"{len(devices)} x {devices[0].device_kind}, {os.cpu_count()} CPU cores, Python "
        f"{platform.python_version()}",
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def load(file: Path) -> dict[str, Any]:
    """Returns the results by case; empty if the file does not exist."""
    return json.loads(file.read_text()) if file.is_file() else {}


def complete(entry: dict[str, Any] | None) -> bool:
    """Returns whether a case was measured with all peers."""
    return bool(found := _measurements(entry)) and not any(one.needs for one in found)


def add(file: Path, case: str, entry: dict[str, Any]) -> None:
    """Stores the results of a case in the file, beside those of other cases."""
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(file, json.dumps(load(file) | {case: entry}, indent=1))


def table(results: dict[str, Any], cases: Sequence[str], compared: Collection[str] = ()) -> str:
    """Returns Markdown tables of the results of some cases, with the environments they were measured in.

    Args:
      results: of `load`.
      cases: their names, in the order of the table.
      compared: names of cases with the same measurements, which get one row each, in a table of their own.
    """
    environments: dict[str, str] = {}
    alone = [case for case in cases if case not in compared]
    together = [case for case in cases if case in compared]
    lines = [*_rows_by_measurement(results, alone, environments), ""] if alone else []
    lines += [*_rows_by_case(results, together, environments), ""] if together else []
    return "\n".join([*lines, *(f"{mark}: {text}" for text, mark in environments.items())])


def _rows_by_measurement(results: dict[str, Any], cases: Sequence[str], environments: dict[str, str]) -> list[str]:
    """Returns a table with a row for each measurement of each case."""
    rows = ["| case | measured | | aim | |", "|---|---|---|---|---|"]
    for case in cases:
        entry = results.get(case)
        if missing := _missing(entry):
            rows.append(f"| {case} | {missing} | | | |")
            continue
        mark = _mark(entry, environments)
        rows += [
            f"| {case} ({mark}): {one.name} | {one.text(4)} | {one.unit} | {one.aim} | {one.verdict} |"
            for one in _measurements(entry)
        ]
    return rows


def _rows_by_case(results: dict[str, Any], cases: Sequence[str], environments: dict[str, str]) -> list[str]:
    """Returns a table with a row for each case and a column for each measurement."""
    measured = {case: _measurements(results.get(case)) for case in cases}
    columns = list({one.name: one for found in measured.values() for one in found}.values())
    heads = [f"{one.name}, {one.unit}" if one.unit else one.name for one in columns] or ["measured"]
    rows = [f"| case | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for case, measurements in measured.items():
        if missing := _missing(results.get(case)):
            rows.append(f"| {case} | {missing} |" + " |" * (len(heads) - 1))
            continue
        for part in dict.fromkeys(one.of for one in measurements):
            numbers = {one.name: one.text(3) + one.judgement for one in measurements if one.of == part}
            cells = " | ".join(numbers.get(one.name, "") for one in columns)
            title = f"{case}, {part}" if part else case
            rows.append(f"| {title} ({_mark(results[case], environments)}) | {cells} |")
    return rows


def _missing(entry: dict[str, Any] | None) -> str:
    """Returns why a case has no measurements; "" if it has."""
    if entry is None:
        return "not run"
    if "needs" in entry:
        return f"not run: needs {entry['needs']}"
    return f"failed: {entry['error']}" if "error" in entry else ""


def _measurements(entry: dict[str, Any] | None) -> list[Measurement]:
    return [Measurement(**values) for values in (entry or {}).get("measurements", [])]


def _mark(entry: dict[str, Any], environments: dict[str, str]) -> str:
    """Returns the letter of a case's environment, and adds a new one to the dictionary."""
    versions = ", ".join(f"{name} {number}" for name, number in entry["versions"].items())
    text = f"commit {entry['commit']}, {entry['machine']}, {versions}"
    return environments.setdefault(text, chr(ord("a") + len(environments)))
