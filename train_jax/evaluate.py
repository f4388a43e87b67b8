"""Evaluation of checkpoints, at the end of a run and by eval.py."""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from train_jax.checkpoints.manager import Checkpoints
from train_jax.completed_run import data_entry
from train_jax.config.base import known_keys, stored_config, task_class
from train_jax.config.resume_check import difference, refuse_sweep
from train_jax.config.validate import validate
from train_jax.core import files, row_sharding
from train_jax.core.errors import UserError, quoted
from train_jax.parallel import sharding
from train_jax.step import placement
from train_jax.system.memory import reported_peak
from train_jax.task import Task, make_task

TRAINING_KEYS = ("finished", "trainable_parameters", "step_temp_bytes")  # entries of eval.json that stay


def evaluate(
    config: ConfigDict,
    workdir: str | Path,
    split: str | None = None,
    checkpoint: str | int = "best",
    began: float | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint of a run, or the model before training if the workdir has no `checkpoints/`.

    Args:
      config: the run's config; changes must not alter the model.
      workdir: folder of the run.
      split: data split. The results of the task's default split, None, go to `eval.json`; the results of another split
        go to `eval-<split>.json`.
      checkpoint: "best" (the latest if no checkpoint was ranked), "latest", or a step.
      began: time (`time.perf_counter`) from which the `seconds` of the results count; None = now.

    Returns:
      The contents of the file written.

    Raises:
      UserError: the config is invalid, a sweep or that of another model; there is no such checkpoint; or a split is
        given to a task without splits.
    """
    began = time.perf_counter() if began is None else began
    validate(config, training=False)
    workdir = Path(workdir)
    refuse_sweep(config, workdir)
    mesh = sharding.make_mesh(config.mesh)
    task, model, step = _load(config, workdir, checkpoint, mesh)
    if split == task.default_split:
        split = None
    if split is not None and not task.has_splits:
        raise UserError(f"split is {split!r}, but the evaluation data of this run have no splits: leave --split out.")
    files.make_folder(workdir)
    stored = files.read_json_or_empty(workdir / "eval.json")
    controls = {name: files.read_json_or_empty(workdir / name / "eval.json") for name in task.control_runs()}
    controls = {name: results for name, results in controls.items() if results and split is None}
    with row_sharding.use_mesh(mesh):
        results = {"step": step} | task.evaluate(model, workdir, split, controls)
    results |= data_entry(task.reported_data()) if split is None else {}
    results |= {"peak_memory_bytes": reported_peak(), "seconds": time.perf_counter() - began}
    if stored.get("finished") and split is None:
        results |= {name: stored[name] for name in TRAINING_KEYS if name in stored}
    write_results(workdir, results, split)
    print_results(results)
    return results


def load_model(config: ConfigDict, workdir: str | Path, checkpoint: str | int = "best") -> nnx.Module:
    """Returns the model of a run, for use outside the loop; it has the arguments and errors of `evaluate`."""
    validate(config, training=False)
    refuse_sweep(config, Path(workdir))
    return _load(config, Path(workdir), checkpoint, sharding.make_mesh(config.mesh))[1]


def _load(config: ConfigDict, workdir: Path, checkpoint: str | int, mesh: Mesh) -> tuple[Task, nnx.Module, int]:
    """Returns the task, its model with the parameters of a checkpoint, and the checkpoint's step (0: untrained)."""
    task = make_task(config, mesh)
    task.check_workdir(workdir)
    if not (workdir / "checkpoints").is_dir() and checkpoint == "best":
        return task, initial_model(task, mesh).model(), 0
    if (workdir / "config.json").is_file():
        _check_same_model(stored_config(workdir), config, task.architecture_keys)
    checkpoints = Checkpoints(workdir / "checkpoints", config.best_metric, config.best_mode, read_only=True)
    try:
        step = resolve(checkpoints, checkpoint)
        item = "ema" if config.ema_decay is not None else "params"
        placed = initial_model(task, mesh)  # slow, so after every check that does not need it
        return task, placed.model(checkpoints.restore_params(step, placed.trainable, item)), step
    finally:
        checkpoints.close()


def initial_model(task: Task, mesh: Mesh) -> placement.PlacedModel:
    """Returns a task's model before training, on the mesh."""
    return placement.place(task.init(), task.trainable(), task.sharding_rules(), mesh)


def _check_same_model(stored: ConfigDict, config: ConfigDict, architecture_keys: Sequence[str]) -> None:
    """Raises UserError if a key that shapes the model differs from the config that made the checkpoint.

    Args:
      stored: the config of the checkpoint.
      config: the requested config.
      architecture_keys: `Task.architecture_keys`, patterns beside the declared keys.
    """
    declared = {name for name, known in known_keys(task_class(config.task)).items() if known.architecture}
    changed = [
        f"{key}: {quoted(a)} -> {quoted(b)}"
        for key, a, b in difference(stored, config)
        if key in declared or any(re.fullmatch(pattern, key) for pattern in architecture_keys)
    ]
    if changed:
        raise UserError(
            f"the run was made with another model ({'; '.join(changed)}), expected the same: leave these keys as they "
            "are in its config.json."
        )


def resolve(checkpoints: Checkpoints, which: str | int) -> int:
    """Returns the step of a checkpoint; "best" means the latest if no evaluation was ranked."""
    if which == "best" and checkpoints.best_step() is None:
        which = "latest"
    return checkpoints.resolve(which)


def print_results(results: dict[str, Any]) -> None:
    """Prints the numbers of an evaluation, one on each line."""
    if jax.process_index() == 0:
        numbers = {name: value for name, value in results.items() if type(value) in (int, float)}
        print("\n".join(f"{name:>24}  {value:.6g}" for name, value in numbers.items()), flush=True)


def write_results(workdir: Path, results: dict[str, Any], split: str | None = None) -> None:
    """Writes eval.json, or eval-<split>.json for a split other than the task's default."""
    if jax.process_index() == 0:
        name = "eval.json" if split is None else f"eval-{split}.json"
        files.write_atomically(workdir / name, files.to_json(results, indent=2) + "\n")
