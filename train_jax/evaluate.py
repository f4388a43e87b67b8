"""Evaluates checkpoints: the end of every run, and again whenever somebody asks."""

import re
import time
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from train_jax.checkpoints.manager import Checkpoints
from train_jax.complete import of_results
from train_jax.config.base import known_keys, stored_config
from train_jax.config.resume_check import difference, refuse_sweep
from train_jax.config.validate import validate
from train_jax.core import files, row_sharding
from train_jax.core.errors import UserError, quoted
from train_jax.parallel import sharding
from train_jax.step import placement
from train_jax.system.memory import reported_peak
from train_jax.task import Task, make_task

OF_TRAINING = ("finished", "trainable_parameters", "step_temp_bytes")  # of eval.json, kept by a later evaluation


def evaluate(
    config: ConfigDict,
    workdir: str | Path,
    split: str | None = None,
    checkpoint: str | int = "best",
    began: float | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint of a run, or the model before training where the workdir has no `checkpoints/`.

    Args:
      config: the run's own, with changes that do not alter the model.
      split: data split; None is the task's own, whose results go to `eval.json` (another's to `eval-<split>.json`).
      checkpoint: "best" (the latest where none was ranked), "latest", or a step.
      began: the time (of `time.perf_counter`) from which on the `seconds` of the results count; None = now.

    Raises:
      UserError: a config that cannot run or is of another model than the run's, a sweep, no such checkpoint, or a split
        where there is one alone.
    """
    began = time.perf_counter() if began is None else began
    validate(config, training=False)
    workdir = Path(workdir)
    refuse_sweep(config, workdir)
    mesh = sharding.make_mesh(config.mesh)
    task, model, step = _trained(config, workdir, checkpoint, mesh)
    if split == task.default_split:
        split = None
    if split is not None and not task.has_splits:
        raise UserError(f"split is {split!r}, but what this run is measured on has no splits: leave --split out.")
    files.make_folder(workdir)
    before = files.read_json(workdir / "eval.json")
    controls = {name: files.read_json(workdir / name / "eval.json") for name in task.control_runs()}
    controls = {name: results for name, results in controls.items() if results and split is None}
    with row_sharding.over(mesh):
        results = {"step": step} | task.evaluate(model, workdir, split, controls)
    results |= of_results(task) if split is None else {}
    results |= {"peak_memory_bytes": reported_peak(), "seconds": time.perf_counter() - began}
    if before.get("finished") and split is None:
        results |= {name: before[name] for name in OF_TRAINING if name in before}
    write_results(workdir, results, split)
    print_results(results)
    return results


def load_model(config: ConfigDict, workdir: str | Path, checkpoint: str | int = "best") -> nnx.Module:
    """The model of a run, for use outside the loop; arguments and errors as of `evaluate`."""
    validate(config, training=False)
    refuse_sweep(config, Path(workdir))
    return _trained(config, Path(workdir), checkpoint, sharding.make_mesh(config.mesh))[1]


def _trained(config: ConfigDict, workdir: Path, checkpoint: str | int, mesh: Mesh) -> tuple[Task, nnx.Module, int]:
    """The task, its model with the parameters of a checkpoint, and the step of that (0: as it was before training)."""
    task = make_task(config, mesh)
    task.check_workdir(workdir)
    if not (workdir / "checkpoints").is_dir() and checkpoint == "best":
        return task, placement.build(task, mesh).model(), 0
    if (workdir / "config.json").is_file():
        _check_same_model(stored_config(workdir), config, task)
    checkpoints = Checkpoints(workdir / "checkpoints", config.best_metric, config.best_mode, read_only=True)
    try:
        step = resolve(checkpoints, checkpoint)
        item = "ema" if config.ema_decay is not None else "params"
        placed = placement.build(task, mesh)  # after all that may be refused without it
        return task, placed.model(checkpoints.restore_params(step, placed.trainable, item)), step
    finally:
        checkpoints.close()


def _check_same_model(stored: ConfigDict, config: ConfigDict, task: Task) -> None:
    """Raises UserError if a key that makes the model differs: the checkpoint's parameters belong to the stored one."""
    declared = {name for name, known in known_keys(type(task)).items() if known.architecture}
    changed = [
        f"{key}: {quoted(a)} -> {quoted(b)}"
        for key, a, b in difference(stored, config)
        if key in declared or any(re.fullmatch(pattern, key) for pattern in task.architecture_keys)
    ]
    if changed:
        raise UserError(
            f"the run was made with another model ({'; '.join(changed)}), expected the same: leave these keys as they "
            "are in its config.json."
        )


def resolve(checkpoints: Checkpoints, which: str | int) -> int:
    """A checkpoint's step; "best" falls back on the latest where no evaluation was ranked."""
    if which == "best" and checkpoints.best_step() is None:
        which = "latest"
    return checkpoints.resolve(which)


def print_results(results: dict[str, Any]) -> None:
    """The numbers of an evaluation, one a line."""
    if jax.process_index() == 0:
        numbers = {name: value for name, value in results.items() if type(value) in (int, float)}
        print("\n".join(f"{name:>24}  {value:.6g}" for name, value in numbers.items()), flush=True)


def write_results(workdir: Path, results: dict[str, Any], split: str | None = None) -> None:
    """Writes eval.json, or eval-<split>.json for a split that is not the task's own."""
    if jax.process_index() == 0:
        name = "eval.json" if split is None else f"eval-{split}.json"
        files.write_atomically(workdir / name, files.to_json(results, indent=2) + "\n")
