"""Whether a complete run is still what its command asks for: its data are compared before that is said."""

from pathlib import Path

from ml_collections import ConfigDict

from train_jax.checkpoints import metadata
from train_jax.config.resume_check import check_data
from train_jax.core import files
from train_jax.core.errors import UserError
from train_jax.data.pipeline import training_batches
from train_jax.parallel import sharding
from train_jax.task import Task, make_task

DATA = "data"  # of eval.json: the fingerprint of what a run was measured on


def check(config: ConfigDict, workdir: Path) -> None:
    """Opens the data of a complete run; no model is read where the task tells its rows without one.

    Raises:
      UserError: other data than the run was trained on or measured on; nothing was written.
    """
    task = make_task(config, sharding.make_mesh(config.mesh))
    latest = metadata.read_latest(workdir / "checkpoints")
    if latest is not None:  # something trained
        source = task.train_records()
        check_data(latest[1]["fingerprint"], training_batches(config, source, num_steps=1).fingerprint, workdir)
    noted, found = files.read_json(workdir / "eval.json").get(DATA), of_results(task).get(DATA)
    if noted is not None and noted != found:
        raise UserError(
            f"the data of {workdir / 'eval.json'} are not those that it was measured on (fingerprint {noted}, now "
            f"{found}): restore the data, evaluate again with eval.py --workdir={workdir}, or choose another --workdir."
        )


def of_results(task: Task) -> dict[str, str]:
    """What eval.json notes of the data that a task reports on, where it tells."""
    found = task.reported_data()
    return {} if found is None else {DATA: found}
