"""Runs without trainable parameters, such as baselines: the model is only evaluated."""

import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from train_jax.completed_run import data_entry
from train_jax.config.base import to_json
from train_jax.core import files
from train_jax.evaluate import initial_model, print_results, write_results
from train_jax.system.memory import reported_peak
from train_jax.task import Task


def fit(config: ConfigDict, workdir: Path, task: Task, mesh: Mesh, began: float) -> dict[str, Any]:
    """Evaluates the model that `task.init` returns; writes the files of a trained run except for checkpoints.

    Args:
      config: validated.
      workdir: folder of the run; created if missing.
      task: defines the model and its evaluation.
      mesh: from `sharding.make_mesh`.
      began: time (`time.perf_counter`) from which the `seconds` of the results count.
    """
    files.make_folder(workdir)
    if jax.process_index() == 0:
        files.write_atomically(workdir / "config.json", to_json(config))
        task.start(workdir)
    model = initial_model(task, mesh).model()
    results = {"step": 0, "trainable_parameters": 0} | task.evaluate(model, workdir)
    results |= data_entry(task.reported_data())
    results |= {"peak_memory_bytes": reported_peak(), "seconds": time.perf_counter() - began, "finished": True}
    write_results(workdir, results)
    print_results(results)
    return results
