"""A PaliGemma that starts from the vision tower of a SigLIP (Beyer et al. 2024): `init.vision` in configs.

The tower's parameters go in by name, `vision/*`; what pools its features and the text tower stay behind.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from paligemma_jax import loading
from paligemma_jax.models.dual_encoder import DualEncoder
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.vit import ViT, ViTConfig, resample_positions
from paligemma_jax.weights.load import placed
from train_jax import params
from train_jax.errors import UserError

POSITIONS = "position_embedding"
SAME = ("patch_size", "width", "depth", "mlp_dim", "num_heads", "eps", "activation", "class_token")


def with_vision(model: PaliGemma | DualEncoder, path: str | Path) -> PaliGemma | DualEncoder:
    """Puts the vision tower of another model in the place of the model's own.

    Args:
      model: with a tower whose kernels are plain; changed, use what is returned. Its parameters keep their dtype and
        where they lie.
      path: whatever `loading.load` reads and has a vision tower: a SigLIP as a Hugging Face folder, hf://owner/name,
        .npz or workdir of a run, "file.npz:img", or a PaliGemma.

    Raises:
      UserError: no model there, or one whose tower has other sizes; only the image size may differ, for which the
        learned positions are resampled as the family of `path` does.
    """
    source = loading.load(path)
    tower = source if isinstance(source, ViT) else getattr(source, "vision", None)
    if tower is None:
        raise UserError(f"{path} has no vision tower, expected a SigLIP or a PaliGemma: give another init.vision.")
    _check(tower.config, model.config.vision, path)
    preprocessing = getattr(source.config, "preprocessing", None)
    big_vision = str(path).endswith(":img") or (preprocessing is not None and preprocessing.source == "big_vision")
    arrays = _fitted(params.flatten(tower), model.config.vision, "bilinear" if big_vision else "bicubic")
    old = params.flatten(model)
    new = {f"vision/{name}": np.asarray(array) for name, array in arrays.items()}
    missing = sorted(new.keys() - old.keys())
    if missing:
        raise UserError(
            f"the model has no {missing[0]} for the tower of {path}, expected plain kernels: quantise it after that."
        )
    return params.assign(
        model, {name: placed(array.astype(old[name].dtype), old[name].sharding) for name, array in new.items()}
    )


def _check(found: ViTConfig, expected: ViTConfig, path: str | Path) -> None:
    """Refuses a tower of another kind or size."""
    other = [name for name in SAME if getattr(found, name) != getattr(expected, name)]
    if other:
        pairs = ", ".join(f"{name} {getattr(found, name)} instead of {getattr(expected, name)}" for name in other)
        raise UserError(
            f"the vision tower of {path} has {pairs}, expected that of the model: give another init.vision."
        )


def _fitted(arrays: Mapping[str, jax.Array], config: ViTConfig, method: str) -> dict[str, np.ndarray | jax.Array]:
    """The tower's parameters, positions for the image size of `config`."""
    positions = np.asarray(arrays[POSITIONS])
    first, patches = np.split(positions, [int(config.class_token)])
    return dict(arrays) | {POSITIONS: np.concatenate([first, resample_positions(patches, config.grid, method)])}
