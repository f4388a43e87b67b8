"""The shapes of a few-shot run for train_jax.plan: from the config alone, whether or not model and images are there.

Sizes come from the checkpoint where it lies on this machine, else from its released name. The number of classes, whose
texts are encoded in every step, comes from the images where they are there.
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
from paligemma_jax.zero_shot import AT_ONCE, embed_pixels
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
"""Names in the hub to those of our variants."""
CLASSES_UNSEEN = 100  # of a data set that is not there
SENTENCES = 50  # about a class, as in the released files


def blueprint(make: Callable[..., Any], config: ConfigDict, mesh: Mesh) -> Blueprint:
    """See train_jax.task.Blueprint. `make` is the task's class, tasks.coprompt.CoPrompt.

    Raises:
      UserError: a config that cannot run, or a model whose sizes are not known.
    """
    config = config.copy_and_resolve_references()
    classes = _classes(config)
    with config.unlocked():
        config.tokenizer = _tokenizer(config)
        config.model.path = _known_path(config.model.path)
        if config.data.name == "images":
            config.data.source = config.data.source or "."
            config.data.descriptions = config.data.descriptions or "."
    task = make(config, mesh)
    length, size = task.model_config.text.length, task.model_config.vision.image_size
    frozen = coprompt_config.weight(config) and config.consistency.on != "image"
    task.assume_texts(classes, SENTENCES if frozen else 0, length)
    pixels = jax.ShapeDtypeStruct((size, size, 3), jnp.uint8)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    label = jax.ShapeDtypeStruct((), jnp.int32)
    example = {"image": pixels, "image_augmented": pixels, "label": label, "weight": scalar, "draw": scalar}
    rows = jax.ShapeDtypeStruct((AT_ONCE, *pixels.shape), pixels.dtype, sharding=sharding.replicated(mesh))
    return Blueprint(task, task.abstract(), example, {"image embeddings": (embed_pixels, (rows,))})


def _classes(config: ConfigDict) -> int:
    """How many are tuned on."""
    data = config.data
    if data.name == "scenes":
        found = len(CLASSES)
    elif data.source and Path(data.source).expanduser().is_dir():
        found = len(open_images(data.source).classes)
    else:
        found = CLASSES_UNSEEN
    return -(-found // 2) if config.protocol == "base_to_novel" else found


def _known_path(path: str) -> str:
    """A path that sizes can be read from, without fetching anything."""
    there = path in SHIPPED or path.startswith(RANDOM)
    if there or (not hub.is_remote(path) and Path(path).expanduser().exists()):
        return path
    name = Path(path).name
    if name not in RELEASED:
        raise UserError(
            f"no model at {path}, and its name is none of {', '.join(RELEASED)}, so its sizes are not known: correct "
            f"model.path, or set it to {RANDOM}clip-b16-224 (or another variant)."
        )
    return RANDOM + RELEASED[name]


def _tokenizer(config: ConfigDict) -> str:
    """Where the run's tokenizer lies, if it is on this machine; else the tiny model's, of which no word is read."""
    path = config.tokenizer or config.model.path
    if hub.is_remote(path):
        return TINY
    try:
        load_text_tokenizer(path)
    except UserError:
        return TINY
    return path
