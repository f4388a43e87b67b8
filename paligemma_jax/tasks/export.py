"""Exports the model of a pretraining run.

    python -m paligemma_jax.tasks.export RUN FOLDER [best|latest|STEP]

Writes a folder as transformers saves it (config.json, model.safetensors in float16, preprocessor_config.json) with the
tokenizer beside it. `pg.load(FOLDER)` reads it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from paligemma_jax.images.preprocessing import preprocessing_of
from paligemma_jax.tasks.pretraining.task import Pretraining
from paligemma_jax.weights.hugging_face import paligemma as hugging_face
from paligemma_jax.weights.hugging_face.processor import write_preprocessing
from paligemma_jax.weights.tokenizer_files import copy_tokenizer
from train_jax.checkpoints.manager import Checkpoints
from train_jax.config import base as config
from train_jax.config import command_line
from train_jax.core.errors import UserError
from train_jax.parallel import sharding

PREFIX = "model/"


def export(run: Path, folder: Path, checkpoint: str = "latest") -> None:
    """Writes a pretraining run's parameters (their moving average, if the run has one) to `folder`.

    Raises:
      UserError: `run` is not a pretraining run, or has no such checkpoint.
    """
    file = run / "config.json"
    if not file.is_file():
        raise UserError(f"{run} has no config.json, expected the workdir of configs/pretrain.py: correct the path.")
    settings = config.read_config(file)
    if config.task_class(settings.task) is not Pretraining:
        raise UserError(f"{run} is a run of {settings.task}, expected one of configs/pretrain.py: correct the path.")
    task = Pretraining(settings, sharding.make_mesh(settings.mesh))
    checkpoints = Checkpoints(run / "checkpoints", read_only=True)
    item = "ema" if settings.ema_decay is not None else "params"
    try:
        arrays = checkpoints.restore_params(checkpoints.resolve(checkpoint), item=item)
    finally:
        checkpoints.close()
    params = {name.removeprefix(PREFIX): a.astype(np.float16) for name, a in arrays.items() if name.startswith(PREFIX)}
    hugging_face.save(folder, task.model_config, params, task.tokenizer.image_id)
    write_preprocessing(folder, preprocessing_of(task.model_config))
    copy_tokenizer(settings.tokenizer, folder)


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    expected = "RUN FOLDER [best|latest|STEP]"
    (run, folder, *checkpoint), _ = command_line.parse(argv, __doc__, lambda values: None, expected, counts=(2, 3))
    export(Path(run), Path(folder), *checkpoint)
    print(f"wrote {folder}")


if __name__ == "__main__":
    command_line.run(main, sys.argv)
