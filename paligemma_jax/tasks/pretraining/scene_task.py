"""The base of the two pretraining tasks: synthetic scenes, the model with its patch heads, and the heads' loss."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from paligemma_jax.data.synthetic_clevr.attributes import ATTRIBUTES
from paligemma_jax.images.preprocessing import preprocessing_of
from paligemma_jax.loading import run_config
from paligemma_jax.models.paligemma import PaliGemma, PaliGemmaConfig, variant
from paligemma_jax.tasks import common
from paligemma_jax.tasks.common import StackKeys
from paligemma_jax.tasks.rendered import RenderKeys, rendered
from paligemma_jax.vision_start import vision_config_of, with_vision
from train_jax.checkpoints.manager import Checkpoints
from train_jax.config.base import check_declared
from train_jax.core import param_tree, patterns
from train_jax.core.config_keys import key, section
from train_jax.core.errors import UserError
from train_jax.core.metrics import Metrics
from train_jax.parallel.sharding import Spec
from train_jax.task import Blueprint, Task


class PretrainingModel(nnx.Module):
    """The model to export, and the patch heads that only training uses."""

    def __init__(self, config, *, rngs: nnx.Rngs):
        self.model = PaliGemma(config, rngs=rngs)
        self.patch_heads = nnx.Dict(
            {name: nnx.Linear(config.vision.width, len(values) + 1, rngs=rngs) for name, values in ATTRIBUTES.items()}
        )


@dataclasses.dataclass(frozen=True)
class ModelKeys(StackKeys):
    """`config.model`."""

    variant: str = key("tiny", "sizes of the model")


@dataclasses.dataclass(frozen=True)
class InitKeys:
    """`config.init`."""

    vision: str | None = key(None, "SigLIP whose vision tower the run starts from; None = a new tower")


@dataclasses.dataclass(frozen=True)
class SceneDataKeys(RenderKeys):
    """`config.data`: synthetic scenes."""

    num_scenes: int = key(20_000, "number of scenes to train on", minimum=1)
    num_held_out: int = key(200, "number of scenes to evaluate on", minimum=1)


@dataclasses.dataclass(frozen=True)
class SceneKeys:
    """The keys of both pretraining tasks."""

    model: ModelKeys = section(lambda: ModelKeys(unroll=True))
    init: InitKeys = section(InitKeys)
    init_from: tuple[str, ...] = key(
        (),
        "workdirs of pretraining runs from whose averaged parameters the run starts; where two have one parameter, "
        "that of the last is used",
    )
    data: SceneDataKeys = section(SceneDataKeys)


class SceneTask(Task):
    """A task on images of synthetic scenes. Subclasses add the loss, and texts if they have any."""

    has_splits = False
    keys = SceneKeys
    op_classes = common.OP_CLASSES

    def __init__(self, config: ConfigDict, mesh):
        if config.micro_batch not in (None, config.batch_size):
            raise UserError(
                f"micro_batch is {config.micro_batch}, expected None: the loss of the patch heads is a mean over the "
                "patches of the whole batch, which micro-batches would change; set a smaller batch_size."
            )
        check_declared(config)
        try:
            sizes = variant(config.model.variant)
        except ValueError as error:
            raise UserError(f"model.variant: {error}") from None
        super().__init__(config, mesh)
        options = {name: config.model[name] for name in ("remat", "unroll", "attention")}
        sizes = sizes.replace(both=dict(dtype=config.compute_dtype, **options))
        model_config = vision_config_of(sizes, config.init.vision)
        assert isinstance(model_config, PaliGemmaConfig)
        self.model_config = model_config

    @classmethod
    def blueprint(cls, config: ConfigDict, mesh: Mesh) -> Blueprint:
        """Returns the shapes of a run, for the plan command; an evaluation needs less memory than a training step."""
        task = cls(config, mesh)
        example = {name: jax.ShapeDtypeStruct(np.shape(row), row.dtype) for name, row in task.blank_row().items()}
        return Blueprint(task, nnx.eval_shape(task.new), example, {})

    def blank_row(self) -> dict[str, np.ndarray]:
        """Returns an empty row with the shapes of the training source."""
        vision = self.model_config.vision
        return {
            "image": np.zeros((vision.image_size, vision.image_size, 3), np.uint8),
            "patches": np.zeros((vision.num_patches, len(ATTRIBUTES)), np.int32),
        }

    def new(self) -> PretrainingModel:
        """Returns an untrained model."""
        return PretrainingModel(self.model_config, rngs=nnx.Rngs(self.config.seed))

    def init(self) -> PretrainingModel:
        """Returns a new model with the tower of `init.vision` and the averaged parameters of the runs in `init_from`.

        Raises:
          UserError: a run without a checkpoint, or of a model of other sizes.
        """
        model = self.new()
        if self.config.init.vision is not None:
            model.model = cast(PaliGemma, with_vision(model.model, self.config.init.vision))  # of the same class
        shapes = param_tree.abstract(model)
        for run in self.config.init_from:
            self._check_preprocessing(run)
            checkpoints = Checkpoints(Path(run) / "checkpoints", read_only=True)
            arrays = checkpoints.restore_params(checkpoints.resolve("latest"), item="ema")
            checkpoints.close()
            for path, array in arrays.items():
                if path not in shapes or shapes[path].shape != array.shape:
                    raise UserError(
                        f"init_from: {run} has {path} of shape {array.shape}, which this model does not have: choose "
                        "another run."
                    )
            model = param_tree.assign(model, arrays)
        return model

    def _check_preprocessing(self, run: str) -> None:
        """Raises UserError if the run's images were prepared differently from this model's."""
        settings = run_config(run)
        vision = settings.init.vision
        preprocessing = vision_config_of(variant(settings.model.variant), vision).preprocessing
        if preprocessing != self.model_config.preprocessing:
            raise UserError(
                f"init_from: {run} trained on images by {preprocessing}, expected {self.model_config.preprocessing} as "
                f"here: set init.vision to {vision!r}."
            )

    def trainable_paths(self) -> list[str]:
        """Returns the paths of the parameters that train."""
        shapes = param_tree.abstract(nnx.eval_shape(self.new))
        return patterns.select(self.trainable(), shapes, what="trainable parameters")

    @abc.abstractmethod
    def trainable(self) -> str:
        """Returns the pattern of the parameters that train."""

    def sharding_rules(self) -> Sequence[tuple[str, Spec]]:
        """Returns the sharding rules of PaliGemma; the patch heads are replicated."""
        return common.SHARDING_RULES

    def rendered(self, stream: str, num_scenes: int) -> Path:
        """Returns the folder of a stream's scenes, rendered on first use."""
        vision = self.model_config.vision
        return rendered(self.config.data, stream, num_scenes, vision.image_size, vision.grid)

    def normalize(self, images: jax.Array) -> jax.Array:
        """Converts uint8 [0, 255] images to float32 in the tower's range."""
        return jnp.asarray(preprocessing_of(self.model_config).normalize(images))

    def evaluate(
        self, model: PretrainingModel, workdir: Path, split: str | None = None, control_results=None
    ) -> dict[str, Any]:
        """Returns the metrics of `validate`."""
        return self.validate(model)


def patch_loss(heads: Mapping[str, nnx.Linear], tower: jax.Array, labels: jax.Array) -> tuple[jax.Array, Metrics]:
    """Returns the mean cross-entropy of the attributes of every patch, and accuracies on patches of objects.

    Patches of objects together weigh as much as patches of the background.

    Args:
      heads: a linear layer for each attribute.
      tower: features of the patches [..., P, D].
      labels: int [..., P, number of attributes]; 0 for the background.
    """
    loss, metrics = jnp.zeros(()), {}
    for index, name in enumerate(ATTRIBUTES):
        logits, label = heads[name](tower), labels[..., index]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        is_object = (label > 0).astype(jnp.float32)
        objects, background = is_object.sum() + 1e-6, (1 - is_object).sum() + 1e-6
        loss += 0.5 * ((nll * is_object).sum() / objects + (nll * (1 - is_object)).sum() / background)
        metrics[f"patch_{name}"] = ((logits.argmax(-1) == label) * is_object).sum(), objects
    return loss / len(ATTRIBUTES), metrics
