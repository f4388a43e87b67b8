"""Pictures of texts by a run of text_to_image: predict.py --workdir=runs/flow_clevr --prompt="a red cube"."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from paligemma_jax.loading import load_run, run_config
from paligemma_jax.tasks.picture_sheet import save_sheet
from paligemma_jax.tasks.text_to_image.task import TextToImage
from train_jax.core.errors import UserError
from train_jax.parallel import sharding


def draw(
    workdir: str | Path,
    texts: Sequence[str],
    file: str | Path,
    *,
    config: ConfigDict | None = None,
    checkpoint: str | int = "best",
    seed: int = 0,
) -> UInt8[np.ndarray, "N I I 3"]:
    """Draws each text, and saves them all on a sheet.

    Args:
      workdir: of the run.
      texts: as it was trained: captions, or all attributes of an object.
      file: PNG of the sheet.
      config: the run's, where it is to differ (eval.guidance, eval.solver and so on).
      checkpoint: of the run.
      seed: of the noise that pictures begin as; another one draws others.

    Raises:
      UserError: no such run, no text, or one that says too little.
    """
    if not texts:
        raise UserError("no text is given to draw: add --prompt.")
    config = config or run_config(workdir)
    model = load_run(workdir, config, checkpoint)
    images = TextToImage(config, sharding.make_mesh(config.mesh)).draw(model, texts, seed)
    save_sheet(list(images), texts, Path(file))
    return images
