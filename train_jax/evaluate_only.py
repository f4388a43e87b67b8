"""A run in which nothing trains, such as a baseline that is only measured: the evaluation of the model as it starts."""

import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from train_jax.complete import of_results
from train_jax.config.base import to_json
from train_jax.core import files
from train_jax.evaluate import print_results, write_results
from train_jax.step import placement
from train_jax.system.memory import reported_peak
from train_jax.task import Task


def fit(config: ConfigDict, workdir: Path, task: Task, mesh: Mesh, began: float) -> dict[str, Any]:
    """Evaluates the model as `task.init` makes it; the workdir gets what that of a trained run has but checkpoints.

    Args:
      began: the time (of `time.perf_counter`) from which on the `seconds` of the results count.
    """
    files.make_folder(workdir)
    if jax.process_index() == 0:
        files.write_atomically(workdir / "config.json", to_json(config))
        task.start(workdir)
    model = placement.build(task, mesh).model()
    results = {"step": 0, "trainable_parameters": 0} | task.evaluate(model, workdir) | of_results(task)
    results |= {"peak_memory_bytes": reported_peak(), "seconds": time.perf_counter() - began, "finished": True}
    write_results(workdir, results)
    print_results(results)
    return results
