"""Loads a model (`pg.load`) from a checkpoint of any format, or from the workdir of a run."""

from pathlib import Path
from typing import cast

from flax import nnx
from ml_collections import ConfigDict

from paligemma_jax.models.dual_encoder import DualEncoder
from paligemma_jax.models.gemma import Gemma
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.vit import ViT
from paligemma_jax.weights import reader
from paligemma_jax.weights.adapters import method_folder, peft, prompt_folder
from train_jax.config import base as config
from train_jax.core.errors import UserError


def load(
    path: str | Path, dtype: str = "float32", *, which: str | int = "best", adapter: str | Path | None = None, **options
) -> PaliGemma | DualEncoder | ViT | Gemma:
    """Reads a model: a Hugging Face folder, hf://owner/name, a big_vision .npz, "tiny", or a run with its adapters.

    Args:
      path: the model's folder, file or name.
      dtype: compute dtype, float32, bfloat16 or float16.
      which: checkpoint of a workdir: "best" (the latest if none was ranked), "latest" or a step.
      adapter: for a checkpoint, a folder that peft saved, or "hf://owner/name" (see weights.load_peft), or the
        `adapter` folder of a run with another method than LoRA; for a dual encoder, a folder that `save_prompts` wrote.
      options: for a checkpoint, see weights.reader.load (image_size, param_dtype, remat, quantize, shardings and
        more); a run takes them from its config.json.

    Returns:
      A PaliGemma, or a DualEncoder for a SigLIP or CLIP; `model.config` has its sizes and its preprocessing.
      "file.npz:img" gives the vision tower alone.

    Raises:
      UserError: no model at `path`, a model that does not match, an adapter of another model, or a run whose base has
        changed since training; no partly loaded model is returned.
    """
    if not is_run(path):
        is_ours = adapter is not None and method_folder.is_adapter(adapter)
        # Opened first, so that faults of the adapter are reported before the base is read.
        opened = None if adapter is None or is_ours else peft.open_peft(adapter)
        model = reader.load(path, dtype, **options)
        if adapter is None:
            return model
        if is_ours and isinstance(model, DualEncoder):
            return prompt_folder.load_prompts(model, adapter)
        if not isinstance(model, PaliGemma):
            kind = "a dual encoder" if isinstance(model, DualEncoder) else "one tower"
            raise UserError(f"{path} is {kind}, expected a whole model for an adapter: give a whole PaliGemma.")
        if opened is None:
            return method_folder.load_adapter(model, adapter)
        return peft.load_peft(model, opened, shardings=options.get("shardings"))
    given = [*options, *(["adapter"] if adapter is not None else [])]
    if given:
        raise UserError(
            f"{path} is a run, loaded with {', '.join(given)}, expected no such options: its config.json has them."
        )
    settings = run_config(path)
    settings.compute_dtype = dtype
    return cast(PaliGemma | DualEncoder, load_run(path, settings, which))  # no other task's model is loaded here


def load_run(path: str | Path, settings: ConfigDict, which: str | int = "best") -> nnx.Module:
    """Returns the model of the run in `path`, of any task.

    `settings` is its `run_config`; compute_dtype may differ.

    Raises:
      UserError: see load.
    """
    from train_jax import loop  # imported here: it is slow to import, and checkpoints do not need it

    settings.mesh.update(data=1, fsdp=1, tensor=1)  # one device, whatever mesh the run was trained on
    return loop.load_model(settings, Path(path).expanduser(), which)


def run_config(path: str | Path) -> ConfigDict:
    """Returns the config of a run, read from its workdir.

    Raises:
      UserError: `path` is no workdir of a run.
    """
    if not is_run(path):
        raise UserError(f"{path} holds no run with checkpoints: give the workdir of train.py, or --model=PATH.")
    return config.read_config(Path(path).expanduser() / "config.json")


def is_run(path: str | Path) -> bool:
    """Returns whether a folder is the workdir of a run."""
    folder = Path(path).expanduser()
    return (folder / "config.json").is_file() and (folder / "checkpoints").is_dir()
