"""`pg.load`: a model from a checkpoint of any format, or from the workdir of a run."""

from pathlib import Path

from flax import nnx
from ml_collections import ConfigDict

from paligemma_jax.models.dual_encoder import DualEncoder
from paligemma_jax.models.gemma import Gemma
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.vit import ViT
from paligemma_jax.weights import reader as checkpoint
from paligemma_jax.weights.adapters import method_folder, peft, prompt_folder
from train_jax.config import base as config
from train_jax.core.errors import UserError


def load(
    path: str | Path, dtype: str = "float32", *, which: str | int = "best", adapter: str | Path | None = None, **options
) -> PaliGemma | DualEncoder | ViT | Gemma:
    """Reads a model: a Hugging Face folder, hf://owner/name, a big_vision .npz, "tiny", or a run with its adapters.

    Args:
      path: where the model is.
      dtype: compute dtype, float32, bfloat16 or float16.
      which: of a workdir, the checkpoint: "best" (the latest where none was ranked), "latest" or a step.
      adapter: of a checkpoint, a folder that peft saved, or "hf://owner/name" (see weights.load_peft), or the
        `adapter` of a run with another method than LoRA; of a dual encoder one that `save_prompts` wrote.
      options: of a checkpoint alone, see weights.reader.load (image_size, param_dtype, remat, quantize, shardings and
        more); a run has its own in its config.json.

    Returns:
      The model, a PaliGemma, or of a SigLIP or CLIP a DualEncoder; `model.config` has its sizes and its preprocessing.
      Of "file.npz:img", the tower alone.

    Raises:
      UserError: no model there, one that does not match, an adapter of another model, or a run whose base is not the
        one it was trained on any more; nothing is half loaded.
    """
    if not is_run(path):
        ours = adapter is not None and method_folder.is_adapter(adapter)
        opened = None if adapter is None or ours else peft.open_peft(adapter)  # its faults show before the base is read
        model = checkpoint.load(path, dtype, **options)
        if adapter is None:
            return model
        if ours and isinstance(model, DualEncoder):
            return prompt_folder.load_prompts(model, adapter)
        if not isinstance(model, PaliGemma):
            what = "a dual encoder" if isinstance(model, DualEncoder) else "one tower"
            raise UserError(f"{path} is {what}, expected a whole model for an adapter: give a whole PaliGemma.")
        if ours:
            return method_folder.load_adapter(model, adapter)
        return peft.load_peft(model, opened, shardings=options.get("shardings"))
    given = [*options, *(["adapter"] if adapter is not None else [])]
    if given:
        raise UserError(
            f"{path} is a run, loaded with {', '.join(given)}, expected no such options: its config.json decides."
        )
    settings = run_config(path)
    settings.compute_dtype = dtype
    return load_run(path, settings, which)


def load_run(path: str | Path, settings: ConfigDict, which: str | int = "best") -> nnx.Module:
    """The model of the run in `path`, of any task; `settings` are its `run_config`, perhaps with another compute_dtype.

    Raises:
      UserError: see load.
    """
    from train_jax import loop  # slow to import, and a checkpoint needs none of it

    settings.mesh.update(data=1, fsdp=1, tensor=1)  # whatever it was trained on
    return loop.load_model(settings, Path(path).expanduser(), which)


def run_config(path: str | Path) -> ConfigDict:
    """The config of a run, from its workdir.

    Raises:
      UserError: there is no run.
    """
    if not is_run(path):
        raise UserError(f"{path} holds no run with checkpoints: give the workdir of train.py, or --model=PATH.")
    return config.from_json((Path(path).expanduser() / "config.json").read_text(encoding="utf-8"))


def is_run(path: str | Path) -> bool:
    """Whether a folder is the workdir of a run."""
    folder = Path(path).expanduser()
    return (folder / "config.json").is_file() and (folder / "checkpoints").is_dir()
