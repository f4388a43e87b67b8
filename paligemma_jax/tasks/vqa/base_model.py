"""Reads the model that a VQA run starts from, without adapters: its weights, or its shapes alone."""

import functools
from typing import Any, cast

from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.tasks.process_cache import PROCESS_CACHE
from paligemma_jax.vision_start import vision_config_of, with_vision
from paligemma_jax.weights.adapters.peft import Shardings
from paligemma_jax.weights.fingerprint import base_digest, model_digest
from paligemma_jax.weights.reader import load, new, stored_dtype
from train_jax.config.base import leaves
from train_jax.core.errors import UserError


def base_shapes(config: ConfigDict) -> PaliGemma:
    """Returns the base of a run with shapes in place of arrays; only the sizes of the checkpoint are read.

    Raises:
      UserError: no PaliGemma at `model.path`, or no model at `init.vision`.
    """
    model = _checked(config, nnx.eval_shape(lambda: new(config.model.path, config.compute_dtype, **_options(config))))
    model.config = cast(Any, vision_config_of(model.config, config.init.vision))  # of the same class
    return model


def open_base(config: ConfigDict, mesh: Mesh, shardings: Shardings) -> PaliGemma:
    """Returns the base of a run, on the mesh; a frozen base is shared with the other runs of this process.

    Args:
      config: of the run.
      mesh: of devices.
      shardings: maps a leaf's path and shape to its sharding.

    Raises:
      UserError: no PaliGemma at `model.path`, or no fitting vision tower at `init.vision`.
    """
    if config.adapter.name == "none":
        return _read(config, shardings)  # trained arrays are donated, so no other run may share them
    vision, options = config.init.vision, tuple(leaves(config.model).items())
    vision_digest = None if vision is None else model_digest(vision)
    key = base_digest(config.model.path), options, config.compute_dtype, mesh, vision_digest
    return PROCESS_CACHE.model(key, functools.partial(_read, config, shardings))


def _read(config: ConfigDict, shardings: Shardings) -> PaliGemma:
    model = load(config.model.path, config.compute_dtype, shardings=shardings, **_options(config))
    model = _checked(config, model)
    if config.init.vision is None:
        return model
    return cast(PaliGemma, with_vision(model, config.init.vision))  # of the same class


def _options(config: ConfigDict) -> dict[str, Any]:
    """Returns the arguments of `weights.reader.load` and `new` that `model` decides."""
    model = config.model
    return {name: model[name] for name in ("image_size", "remat", "unroll", "attention")} | {
        "param_dtype": model.param_dtype or _default_param_dtype(config),
        "quantize": model.quantize or None,
        "block_size": model.quantize_block_size,
        "double": model.quantize_double,
    }


def _checked(config: ConfigDict, model: nnx.Module) -> PaliGemma:
    """Returns the model if it is a PaliGemma. Raises UserError otherwise."""
    if not isinstance(model, PaliGemma):
        raise UserError(
            f"model.path is {config.model.path}, a {type(model).__name__}, expected a PaliGemma: give one. A SigLIP's "
            "tower can be its vision tower: set init.vision."
        )
    return model


def _default_param_dtype(config: ConfigDict) -> str:
    if config.adapter.name == "none":
        return "float32"
    if config.model.quantize:
        # Not the compute dtype: a run evaluated or merged in another dtype must have the same quantised weights.
        return stored_dtype(config.model.path)
    return config.compute_dtype
