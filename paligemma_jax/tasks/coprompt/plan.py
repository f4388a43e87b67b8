"""The shapes of a few-shot run for train_jax.plan, from the config alone; model and images need not exist here.

Sizes come from the checkpoint if it is on this machine, else from its released name. The number of classes, whose texts
are encoded in every step, comes from the images if they are on this machine.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from paligemma_jax.data.few_shot.class_folders import open_images
from paligemma_jax.data.synthetic_clevr.classes import CLASSES
from paligemma_jax.data.tokenizers.text_tower import load_text_tokenizer
from paligemma_jax.files import hub
from paligemma_jax.files.shipped import SHIPPED
from paligemma_jax.models.variants import TINY
from paligemma_jax.tasks.coprompt import config as coprompt_config
from paligemma_jax.weights.reader import RANDOM
from paligemma_jax.zero_shot import BATCH_SIZE, embed_pixels
from train_jax.core.errors import UserError
from train_jax.parallel import sharding
from train_jax.task import Blueprint

RELEASED = {
    "clip-vit-base-patch32": "clip-b32-224",
    "clip-vit-base-patch16": "clip-b16-224",
    "clip-vit-large-patch14": "clip-l14-224",
    "clip-vit-large-patch14-336": "clip-l14-336",
    "siglip-base-patch16-224": "siglip-b16-224",
    "siglip-large-patch16-256": "siglip-l16-256",
    "siglip-so400m-patch14-384": "siglip-so400m14-384",
}
"""Variants by their names in the hub."""
DEFAULT_CLASSES = 100  # of a data set that is not on this machine
SENTENCES = 50  # about a class, as in the released files


def blueprint(make: Callable[..., Any], config: ConfigDict, mesh: Mesh) -> Blueprint:
    """Returns the blueprint of a run, see train_jax.task.Blueprint.

    Args:
      make: the task's class, tasks.coprompt.CoPrompt.
      config: of the run.
      mesh: of devices.

    Raises:
      UserError: a config that cannot run, or a model of unknown size.
    """
    config = config.copy_and_resolve_references()
    classes = _classes(config)
    with config.unlocked():
        config.tokenizer = _tokenizer(config)
        config.model.path = _known_path(config.model.path)
        if config.data.name != "scenes":
            config.data.descriptions = config.data.descriptions or "."
        if config.data.name == "images":
            config.data.source = config.data.source or "."
    task = make(config, mesh)
    size = task.model_config.vision.image_size
    frozen = coprompt_config.weight(config) and config.consistency.on != "image"
    texts = task.blank_texts(classes, SENTENCES if frozen else 0)
    pixels = jax.ShapeDtypeStruct((size, size, 3), jnp.uint8)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    label = jax.ShapeDtypeStruct((), jnp.int32)
    example = {"image": pixels, "image_augmented": pixels, "label": label, "weight": scalar, "draw": scalar}
    rows = jax.ShapeDtypeStruct((BATCH_SIZE, *pixels.shape), pixels.dtype, sharding=sharding.replicated(mesh))
    return Blueprint(task, task.abstract(texts), example, {"image embeddings": (embed_pixels, (rows,))})


def _classes(config: ConfigDict) -> int:
    """Returns the number of classes that the run is tuned on."""
    data = config.data
    if data.name == "scenes":
        number = len(CLASSES)
    elif data.source and Path(data.source).expanduser().is_dir():
        number = len(open_images(data.source).classes)
    else:
        number = DEFAULT_CLASSES
    return -(-number // 2) if config.protocol == "base_to_novel" else number


def _known_path(path: str) -> str:
    """Returns a path that sizes can be read from without fetching anything."""
    local = path in SHIPPED or path.startswith(RANDOM)
    if local or (not hub.is_remote(path) and Path(path).expanduser().exists()):
        return path
    name = Path(path).name
    if name not in RELEASED:
        raise UserError(
            f"no model at {path}, and its name is none of {', '.join(RELEASED)}, so its sizes are not known: correct "
            f"model.path, or set it to {RANDOM}clip-b16-224 (or another variant)."
        )
    return RANDOM + RELEASED[name]


def _tokenizer(config: ConfigDict) -> str:
    """Returns the path of the run's tokenizer if it is on this machine, else the tiny model's: no text is read."""
    path = config.tokenizer or config.model.path
    if hub.is_remote(path):
        return TINY
    try:
        load_text_tokenizer(path)
    except UserError:
        return TINY
    return path
