"""Checks whether the run in a workdir may continue under a changed config.

A change of the mathematics is refused. Keys that are declared `resume_safe` (devices, logging, checkpoints, patience)
may change, and the run may be made longer. All of this is read from small files, before data or the model are loaded.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from train_jax.checkpoints import metadata
from train_jax.config.base import known_keys, leaves, steps, stored_config, task_class
from train_jax.config.durations import Durations
from train_jax.config.run_keys import UNITS
from train_jax.core import files
from train_jax.core.errors import UserError, quoted

TOTALS = tuple(f"total_{unit}" for unit in UNITS)
ABSENT = "(absent)"
SWEEP_FILE = "sweep.json"  # in the folder of a sweep; its runs are in subfolders


class ExistingRun(NamedTuple):
    """An earlier run in a workdir.

    Attributes:
      notes: sentences about it, to print.
      results: the contents of eval.json if the run is complete, else None.
    """

    notes: list[str]
    results: dict[str, Any] | None


def inspect_workdir(workdir: Path, config: ConfigDict) -> ExistingRun | None:
    """Returns the run in a workdir, checked against `config`; None if there is no checkpoint and no results.

    An early-stopped run is not resumed, even if the config asks for a longer run, unless the patience is larger.

    Raises:
      UserError: as for `check_resume`, or the run's config is missing.
    """
    latest = metadata.read_latest(workdir / "checkpoints")
    if latest is None:
        return _evaluated_only(workdir, config)
    step, meta = latest
    examples = meta["fingerprint"]["examples"]  # compared with the data when they are opened
    notes = check_resume(stored_config(workdir), config, examples)
    early = is_early_stopped(meta, config.patience)
    done = early or step >= Durations.of(config, examples).total
    results = _final_results(workdir) if done else None
    outcome, remedy = f"{step} steps trained and evaluated", ""
    if early:
        outcome = (
            f"the run stopped early at step {step}, when {meta['without_improvement']} evaluations in a row had "
            f"brought no better {config.best_metric} (patience={config.patience})"
        )
        remedy = "; to train on, raise config.patience or set it to None"
    if results is not None:
        notes = [f"{workdir} is complete: {outcome}, see {workdir / 'eval.json'}{remedy}."]
    elif early:
        notes = [f"{outcome}, and only its evaluation is left{remedy}."]
    return ExistingRun(notes, results)


def _evaluated_only(workdir: Path, config: ConfigDict) -> ExistingRun | None:
    """Returns the earlier run of a task that trains nothing: it has no checkpoint and is complete once evaluated."""
    results = _final_results(workdir)
    if results is None or results["step"] > 0:  # the checkpoints of this run were removed
        return None
    notes = check_resume(stored_config(workdir), config, epoch_examples=1)
    return ExistingRun([*notes, f"{workdir} is complete: nothing trains, see {workdir / 'eval.json'}."], results)


def refuse_sweep(config: ConfigDict, workdir: Path) -> None:
    """Refuses a sweep where one run is expected.

    Raises:
      UserError: `config` defines a sweep, or the workdir contains one; the message names the folders of its runs.
    """
    summary = files.read_json_or_empty(workdir / SWEEP_FILE)
    if summary:
        folders = [run["name"] for run in summary["runs"] if (workdir / run["name"] / "config.json").is_file()]
        names = ", ".join(str(workdir / name) for name in folders) or "none has begun"
        raise UserError(f"{workdir} holds a sweep, expected one run: give --workdir one of its folders ({names})")
    if config.sweep.runs:
        names = ", ".join(name for name, _ in config.sweep.runs)
        raise UserError(
            f"the config is a sweep of {names}, expected one run: train it with train.py, or set sweep.runs=()"
        )


def is_early_stopped(meta: dict[str, Any], patience: int | None) -> bool:
    """Returns whether the run of a checkpoint stopped early and would do so again with this patience."""
    return meta["stopped_early"] and patience is not None and meta["without_improvement"] >= patience


def _final_results(workdir: Path) -> dict[str, Any] | None:
    """Returns the contents of eval.json if the run wrote it at its end; eval.py writes it for unfinished runs too."""
    results = files.read_json_or_empty(workdir / "eval.json")
    return results if results.get("finished") else None


def difference(old: ConfigDict, new: ConfigDict) -> list[tuple[str, Any, Any]]:
    """Returns (key, old value, new value) for every dotted key that differs; a missing one has the value `ABSENT`."""
    before, after = leaves(old), leaves(new)
    pairs = [(key, before.get(key, ABSENT), after.get(key, ABSENT)) for key in before | after]
    return [(key, a, b) for key, a, b in pairs if a != b]


def check_resume(old: ConfigDict, new: ConfigDict, epoch_examples: int | None = None) -> list[str]:
    """Checks that a run that was made with `old` may continue with `new`.

    Args:
      old: the config of the workdir.
      new: the requested config.
      epoch_examples: size of the training data, to compare lengths in different units.

    Returns:
      One sentence per change that is allowed.

    Raises:
      UserError: a key changes the mathematics, or the run is shorter; the message lists every such key.
    """
    task = task_class(new.task)
    declared = {name for name, known in known_keys(task).items() if known.resume_safe}
    refused, notes = [], []
    for key, before, after in difference(old, new):
        if key in TOTALS:
            continue
        change = f"{key}: {quoted(before)} -> {quoted(after)}"
        if key in declared or any(re.fullmatch(pattern, key) for pattern in task.resume_safe_keys):
            notes.append(f"{change} (does not change the mathematics)")
        else:
            refused.append(change)
    if refused:
        raise UserError(
            f"the workdir holds a run with another config ({'; '.join(refused)}), expected the same: undo the change, "
            f"or choose another --workdir"
        )
    return notes + _compare_totals(old, new, epoch_examples)


def check_data(before: dict[str, Any], now: dict[str, Any], workdir: Path) -> None:
    """Compares the fingerprint of the data in a checkpoint with the one of the current data (data.pipeline.Pipeline).

    Raises:
      UserError: they differ; the message names the entries.
    """
    now = files.plain(now)
    if before != now:
        changed = {name: (before.get(name), value) for name, value in now.items() if before.get(name) != value}
        raise UserError(
            f"the training data is not that of the checkpoint in {workdir} (was, is: {changed}): restore the data, or "
            "choose another --workdir."
        )


def _compare_totals(old: ConfigDict, new: ConfigDict, epoch_examples: int | None) -> list[str]:
    totals = [{key: config[key] for key in TOTALS if config.get(key) is not None} for config in (old, new)]
    if totals[0] == totals[1]:
        return []
    before, after = (" ".join(f"{key}={value}" for key, value in total.items()) for total in totals)
    old_steps, new_steps = (steps(config, "total", config.batch_size, epoch_examples) for config in (old, new))
    if new_steps < old_steps:
        raise UserError(
            f"the workdir holds a run of {old_steps} steps ({before}) and {after} asks for {new_steps}, expected as "
            f"many or more: lengthen the run, or choose another --workdir"
        )
    optimizer = new.optimizer
    stretches = optimizer.schedule in ("linear", "cosine") or optimizer.warmup_percent is not None
    note = "; the learning-rate schedule stretches with it" if stretches else ""
    return [f"the run is extended from {old_steps} to {new_steps} steps ({before} -> {after}){note}"]
