"""Starts a PaliGemma from the vision tower of a SigLIP (Beyer et al. 2024): `init.vision` in configs.

The tower's parameters `vision/*` and its preprocessing are copied; its pooling head and the text tower are not.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from flax import nnx

from paligemma_jax import loading
from paligemma_jax.images.preprocessing import Preprocessing
from paligemma_jax.models.dual_encoder import DualEncoder
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.vit import ViT, ViTConfig, resample_positions
from paligemma_jax.weights.checkpoint import Config, Model
from paligemma_jax.weights.reader import new, placed
from train_jax.core import param_tree
from train_jax.core.errors import UserError

POSITIONS = "position_embedding"
SAME = ("patch_size", "width", "depth", "mlp_dim", "num_heads", "eps", "activation", "class_token")


def with_vision(model: PaliGemma | DualEncoder, path: str | Path) -> PaliGemma | DualEncoder:
    """Replaces a model's vision tower, and its image preprocessing, by those of another model.

    Args:
      model: with a tower whose kernels are not quantised. It is changed: use the returned model. Parameters keep their
        dtype and sharding.
      path: any path that `loading.load` reads as a model with a vision tower: a SigLIP as a Hugging Face folder,
        hf://owner/name, .npz or workdir of a run, "file.npz:img", or a PaliGemma.

    Raises:
      UserError: no model at `path`, or a tower of other sizes. Only the image size may differ; the learned positions
        are then resampled as the family of `path` resamples them.
    """
    source = loading.load(path)
    tower = source if isinstance(source, ViT) else getattr(source, "vision", None)
    if tower is None:
        raise UserError(f"{path} has no vision tower, expected a SigLIP or a PaliGemma: give another init.vision.")
    _check(tower.config, model.config.vision, path)
    preprocessing = _preprocessing(source)
    big_vision = preprocessing is not None and preprocessing.source == "big_vision"
    arrays = _fitted(param_tree.flatten(tower), model.config.vision, "bilinear" if big_vision else "bicubic")
    old = param_tree.flatten(model)
    new = {f"vision/{name}": np.asarray(array) for name, array in arrays.items()}
    missing = sorted(new.keys() - old.keys())
    if missing:
        raise UserError(
            f"the model has no {missing[0]} for the tower of {path}, expected plain kernels: quantise it afterwards."
        )
    model = param_tree.assign(
        model, {name: placed(array.astype(old[name].dtype), old[name].sharding) for name, array in new.items()}
    )
    model.config = cast(Any, _prepared(model.config, preprocessing))  # of the same class
    return model


def vision_config_of(config: Config, path: str | Path | None) -> Config:
    """Returns the config of a new model that takes its vision tower from `path`: with that tower's preprocessing.

    Args:
      config: of the model.
      path: as for `with_vision`; None returns `config` unchanged. No weights of a checkpoint are read.

    Raises:
      UserError: no model at `path`.
    """
    if path is None:
        return config
    source = loading.load(path) if loading.is_run(path) else nnx.eval_shape(lambda: new(path))
    return _prepared(config, _preprocessing(source))


def _preprocessing(source: Model) -> Preprocessing | None:
    """Returns a model's preprocessing; a lone ViT comes from a big_vision file."""
    if isinstance(source, ViT):
        return Preprocessing.big_vision(source.config.image_size)
    return getattr(source.config, "preprocessing", None)


def _prepared(config: Config, preprocessing: Preprocessing | None) -> Config:
    """Returns the config with another tower's preprocessing, at its own image size."""
    if preprocessing is None:
        return config
    return dataclasses.replace(config, preprocessing=preprocessing.at(config.vision.image_size))


def _check(tower: ViTConfig, expected: ViTConfig, path: str | Path) -> None:
    """Raises UserError for a tower of another kind or size."""
    different = [name for name in SAME if getattr(tower, name) != getattr(expected, name)]
    if different:
        pairs = ", ".join(f"{name} {getattr(tower, name)} instead of {getattr(expected, name)}" for name in different)
        raise UserError(
            f"the vision tower of {path} has {pairs}, expected that of the model: give another init.vision."
        )


def _fitted(arrays: Mapping[str, jax.Array], config: ViTConfig, method: str) -> dict[str, np.ndarray | jax.Array]:
    """Returns the tower's parameters, with the positions resampled for the image size of `config`."""
    positions = np.asarray(arrays[POSITIONS])
    first, patches = np.split(positions, [int(config.class_token)])
    return dict(arrays) | {POSITIONS: np.concatenate([first, resample_positions(patches, config.grid, method)])}
