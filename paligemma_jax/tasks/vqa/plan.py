"""The shapes of a VQA run for train_jax.plan, from the config alone; the checkpoint need not exist on this machine.

Sizes come from the checkpoint's config if it is on this machine, else from the name of a released checkpoint
("paligemma-3b-pt-224") or of a variant ("random:3b-224"). Without the checkpoint's tokenizer the tiny model's is used,
which changes only the length of the candidate answers. The training step is planned for rows of the longest text that
the config allows, which a run computes only if it has them (data.buckets).
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from paligemma_jax.data.records import blank_record
from paligemma_jax.data.tokenizers.paligemma import load_tokenizer
from paligemma_jax.files import hub
from paligemma_jax.metrics.model_flops import FULL, LORA, model_flops
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.tasks.vqa.evaluation import OUTPUTS, VQAEvaluation, initial_batch_size
from paligemma_jax.tasks.vqa.features import ENCODE_BATCH, FEATURES, encode_images, feature_shape
from paligemma_jax.tasks.vqa.rows import RowProcessor
from paligemma_jax.weights.reader import RANDOM
from train_jax.core.errors import UserError
from train_jax.parallel import sharding
from train_jax.task import Blueprint

RELEASED = re.compile(r"paligemma(2?)-(\d+b)\b.*?\b(224|448|896)\b.*")
NAMES = {"generate": "generated answers", "likelihood": "likelihood of candidates", "loss": "token loss"}
TINY = "tiny"


def blueprint(make: Callable[..., Any], config: ConfigDict, mesh: Mesh) -> Blueprint:
    """Returns the blueprint of a run, see train_jax.task.Blueprint.

    Args:
      make: the task's class, tasks.vqa.VQA.
      config: of the run.
      mesh: of devices.

    Raises:
      UserError: a config that cannot run, or a model of unknown size.
    """
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.tokenizer = _tokenizer(config)
        config.model.path = _known_path(config.model.path)
        config.init.vision = None  # which changes no shape
    task = make(config, mesh)
    model = task.initial_shapes()
    arrays = task.processor.image_and_text(blank_record())
    if config.cache_features:
        arrays = task.processor.text(blank_record()) | {FEATURES: np.zeros(feature_shape(model), np.float32)}
    example = {name: jax.ShapeDtypeStruct(np.shape(array), array.dtype) for name, array in arrays.items()}
    example["weight"] = jax.ShapeDtypeStruct((), np.float32)
    programs = _programs(config, mesh, task.processor, task.evaluation, model)
    return Blueprint(task, model, example, programs, _model_flops(config, model))


def _model_flops(config: ConfigDict, model: PaliGemma) -> float:
    """Returns the model FLOPs of a step whose rows have no padding."""
    length, rows = config.data.prefix_length + config.data.suffix_length - 1, config.batch_size
    passes = FULL if config.adapter.name == "none" else LORA
    if config.cache_features:
        passes = passes._replace(tower=0)
    return float(model_flops(model.config, rows, rows * length, rows * config.data.suffix_length, passes))


def _programs(
    config: ConfigDict,
    mesh: Mesh,
    processor: RowProcessor,
    evaluation: Callable[[PaliGemma], VQAEvaluation],
    model: PaliGemma,
) -> dict[str, tuple]:
    """Returns the programs of an evaluation, and of encoding the training images under `cache_features`."""
    rows = sharding.batch_sharding(mesh, accumulate=False)
    size = initial_batch_size(config, mesh)

    def shape(array: np.ndarray, count: int = size) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *array.shape), array.dtype, sharding=rows)

    image = processor.image(blank_record())["image"]
    arrays = processor.prompt_and_text(blank_record()) | {"weight": np.zeros((), np.float32)}
    batch = {name: shape(array) for name, array in arrays.items()}
    batch["features"] = jax.ShapeDtypeStruct((size, *feature_shape(model)), np.float32, sharding=rows)
    programs = {"image features": (encode_images, (shape(image),))}
    if config.cache_features:
        parts = sharding.row_divisor(mesh.shape)
        programs["features of training images"] = (encode_images, (shape(image, -(-ENCODE_BATCH // parts) * parts),))
    names = OUTPUTS if config.eval.candidates else ("generate", "loss")
    return programs | {NAMES[name]: (functools.partial(_evaluate, evaluation, name), (batch,)) for name in names}


def _evaluate(
    evaluation: Callable[[PaliGemma], VQAEvaluation], name: str, model: PaliGemma, batch: dict[str, jax.Array]
):
    """Runs one of the programs of an evaluation of this model."""
    evaluated = evaluation(model)
    return evaluated.programs()[name](evaluated.model, batch)


def _known_path(path: str) -> str:
    """Returns a path that `weights.reader.new` can read sizes from without fetching anything."""
    if path == TINY or path.startswith(RANDOM) or (not hub.is_remote(path) and Path(path).expanduser().exists()):
        return path
    released = RELEASED.fullmatch(Path(path).name)
    if released is None:
        raise UserError(
            f"no model at {path}, and its name is not that of a released one, so its sizes are not known: correct "
            f"model.path, or set it to {RANDOM}3b-224 (or another variant)."
        )
    second, size, pixels = released.groups()
    return f"{RANDOM}{'pg2-' if second else ''}{size}-{pixels}"


def _tokenizer(config: ConfigDict) -> str:
    """Returns the path of the run's tokenizer if it is on this machine, else the tiny model's."""
    path = config.tokenizer or config.model.path
    if hub.is_remote(path):
        return TINY
    try:
        load_tokenizer(path)
    except UserError:
        return TINY
    return path
