"""The shapes of a contrastive run for train_jax.plan, from the config alone, without data or a tokenizer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from paligemma_jax.data.sources.captioned import FEATURES
from paligemma_jax.models.variants import TINY
from paligemma_jax.tasks.contrastive.data import OPENERS
from paligemma_jax.zero_shot import BATCH_SIZE, embed_rows
from train_jax.parallel import sharding
from train_jax.task import Blueprint


def blueprint(make: Callable[..., Any], config: ConfigDict, mesh: Mesh) -> Blueprint:
    """Returns the blueprint of a run, see train_jax.task.Blueprint.

    Args:
      make: the task's class, tasks.contrastive.Contrastive.
      config: of the run.
      mesh: of devices.

    Raises:
      UserError: a config that cannot run.
    """
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.tokenizer = config.tokenizer or (None if config.model.path else TINY)  # only its size matters
        if config.data.name in OPENERS:
            config.data.source = config.data.source or "."
    task = make(config, mesh)
    model = task.abstract()
    vision, length = task.model_config.vision, task.model_config.text.length
    example = {
        "image": jax.ShapeDtypeStruct((vision.image_size, vision.image_size, 3), jnp.uint8),
        "tokens": jax.ShapeDtypeStruct((length,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((length,), jnp.bool_),
    }
    replicated = sharding.replicated(mesh)
    rows = {
        name: jax.ShapeDtypeStruct((BATCH_SIZE, *leaf.shape), leaf.dtype, sharding=replicated)
        for name, leaf in example.items()
    }
    if config.cache_features:
        del example["image"]
        example[FEATURES] = jax.ShapeDtypeStruct((vision.num_tokens, vision.width), jnp.float32)
    example |= {name: jax.ShapeDtypeStruct((), jnp.int32) for name in ("text_id", "image_id")}
    if config.data.name != "scenes":
        example["weight"] = jax.ShapeDtypeStruct((), jnp.float32)
    return Blueprint(task, model, example, {"embeddings": (embed_rows, (rows,))})
