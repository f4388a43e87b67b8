"""Reads the model that a VQA run starts from, without adapters."""

import functools
from collections.abc import Callable
from typing import cast

from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.tasks.process_cache import PROCESS_CACHE
from paligemma_jax.vision_start import with_vision
from paligemma_jax.weights.adapters.peft import Shardings
from paligemma_jax.weights.fingerprint import base_digest, model_digest
from paligemma_jax.weights.reader import load, stored_dtype
from train_jax.config.base import leaves
from train_jax.core.errors import UserError

Read = Callable[..., nnx.Module]


def open_base(config: ConfigDict, mesh: Mesh, shardings: Shardings, read: Read | None = None) -> PaliGemma:
    """Returns the base of a run, on the mesh; a frozen base is shared with the other runs of this process.

    Args:
      config: of the run.
      mesh: of devices.
      shardings: maps a leaf's path and shape to its sharding.
      read: reads the base in place of weights.reader.load, with the same arguments; such a base is not cached.

    Raises:
      UserError: no PaliGemma at `model.path`, or no fitting vision tower at `init.vision`.
    """
    if config.adapter.name == "none" or read is not None:
        return _read(config, shardings, read)  # trained arrays are donated, so no other run may share them
    vision, options = config.init.vision, tuple(leaves(config.model).items())
    vision_digest = None if vision is None else model_digest(vision)
    key = base_digest(config.model.path), options, config.compute_dtype, mesh, vision_digest
    return PROCESS_CACHE.model(key, functools.partial(_read, config, shardings))


def _read(config: ConfigDict, shardings: Shardings, read: Read | None = None) -> PaliGemma:
    model = (read or load)(
        config.model.path,
        config.compute_dtype,
        image_size=config.model.image_size,
        param_dtype=config.model.param_dtype or _default_param_dtype(config),
        remat=config.model.remat,
        unroll=config.model.unroll,
        attention=config.model.attention,
        quantize=config.model.quantize or None,
        block_size=config.model.quantize_block_size,
        double=config.model.quantize_double,
        shardings=shardings,
    )
    if not isinstance(model, PaliGemma):
        raise UserError(
            f"model.path is {config.model.path}, a {type(model).__name__}, expected a PaliGemma: give one. A SigLIP's "
            "tower can be its vision tower: set init.vision."
        )
    if config.init.vision is None or read is not None:
        return model
    return cast(PaliGemma, with_vision(model, config.init.vision))  # of the same class


def _default_param_dtype(config: ConfigDict) -> str:
    if config.adapter.name == "none":
        return "float32"
    if config.model.quantize:
        # Not the compute dtype: a run evaluated or merged in another dtype must have the same quantised weights.
        return stored_dtype(config.model.path)
    return config.compute_dtype
