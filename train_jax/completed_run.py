"""Checks that the data of a complete run have not changed since."""

from pathlib import Path

from ml_collections import ConfigDict

from train_jax.checkpoints import metadata
from train_jax.config.resume_check import check_data
from train_jax.core import files
from train_jax.core.errors import UserError
from train_jax.data.pipeline import training_batches
from train_jax.parallel import sharding
from train_jax.task import make_task

DATA = "data"  # key of eval.json: fingerprint of the evaluation data


def check(config: ConfigDict, workdir: Path) -> None:
    """Compares the data of a complete run with their stored fingerprints.

    Writes nothing, and loads no model if the task opens its records without one (`Task.train_records`).

    Raises:
      UserError: the training data or the evaluation data have changed.
    """
    task = make_task(config, sharding.make_mesh(config.mesh))
    latest = metadata.read_latest(workdir / "checkpoints")
    if latest is not None:
        source = task.train_records()
        check_data(latest[1]["fingerprint"], training_batches(config, source, num_steps=1).fingerprint, workdir)
    stored, current = files.read_json_or_empty(workdir / "eval.json").get(DATA), task.reported_data()
    if stored is not None and stored != current:
        raise UserError(
            f"the evaluation data of {workdir / 'eval.json'} have changed (fingerprint {stored}, now {current}): "
            f"restore the data, evaluate again with eval.py --workdir={workdir}, or choose another --workdir."
        )


def data_entry(fingerprint: str | None) -> dict[str, str]:
    """Returns the entry of eval.json with the fingerprint of the evaluation data; empty if there is none."""
    return {} if fingerprint is None else {DATA: fingerprint}
