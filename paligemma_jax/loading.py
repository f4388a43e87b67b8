"""`pg.load`: a model from a checkpoint of any format, or from the workdir of a run."""

from pathlib import Path

from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.weights import load as checkpoint
from train_jax import config


def load(path: str | Path, dtype: str = "float32", *, which: str | int = "best", **options) -> PaliGemma:
    """Reads a PaliGemma from a Hugging Face folder, a big_vision .npz, "tiny", or a run's workdir (with its adapters).

    Args:
      path: where the model is.
      dtype: compute dtype, float32, bfloat16 or float16.
      which: of a workdir, the checkpoint: "best" (the latest where none was ranked), "latest" or a step.
      options: of a checkpoint, see weights.load.load (image_size, param_dtype, remat, decoder fields).

    Returns:
      The model; `model.config` has its sizes and its preprocessing.

    Raises:
      UserError: no model there, or one that does not match; nothing is half loaded.
    """
    if not is_run(path):
        return checkpoint.load(path, dtype, **options)
    from train_jax import loop  # slow to import, and a checkpoint needs none of it

    settings = config.from_json((Path(path) / "config.json").read_text())
    with settings.unlocked():
        settings.compute_dtype = dtype
    return loop.load_model(settings, Path(path), which)


def is_run(path: str | Path) -> bool:
    """Whether a folder is the workdir of a run."""
    return (Path(path) / "config.json").is_file() and (Path(path) / "checkpoints").is_dir()
