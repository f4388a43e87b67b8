"""The base class of tasks that train a flow from noise to images: models, evaluation and rows. See flow_task.py."""

import abc
import functools
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from flow_jax.data.image_datasets import ImageData
from flow_jax.data.image_pairs import ImagePairs
from flow_jax.models.dit import DiT, DiTConfig
from flow_jax.models.unet import UNet, UNetConfig
from flow_jax.ode import likelihood
from flow_jax.tasks import image_evaluation
from flow_jax.tasks.flow_task import FlowTask
from flow_jax.tasks.image_evaluation import ImageEvaluation
from train_jax.config.base import check_choices
from train_jax.core.errors import UserError
from train_jax.step.placement import own_copy

MODELS = {"unet": (UNet, UNetConfig), "dit": (DiT, DiTConfig)}


class ImageFlowTask(FlowTask):
    """A flow from noise to images. A subclass defines `data`, opened on first use, as planning does not need it.

    Attributes:
      size, channels: of the images.
    """

    validation_metrics = ("frechet",)
    size: int
    channels: int

    @staticmethod
    def defaults() -> ConfigDict:
        config = FlowTask.defaults()
        config.model = ConfigDict(
            {
                "name": "unet",  # unet | dit
                "dropout": 0.0,
                "label_dropout": 0.1,  # share of labels that are replaced by none, for guidance
                "remat": False,  # recompute blocks in the backward pass: less memory, a third more time
                # multipliers of the width, one a resolution, () = (1, 2); attention at feature maps of these sides
                "unet": {"width": 32, "multipliers": (), "num_blocks": 1, "attention": (), "head_width": 32},
                "dit": {"patch_size": 2, "width": 128, "depth": 6, "num_heads": 4},
            }
        )
        config.eval = ConfigDict(
            {
                "num_samples": placeholder(int),  # None: as many as there are held-out images
                "validation_samples": 200,
                "batch_size": 1000,  # samples drawn, and likelihoods measured, at once
                "features": "pixels",  # of the Frechet distance: pixels, or "module:function", see docs/flow.md
                "reference": "held_out",  # real images that samples are measured against: held_out | train
                "reference_examples": 50_000,  # of them at most
                "guidance": 1.0,  # of classifier-free guidance; 1 is the model itself
                "solver": "dopri5",
                "tolerance": 1e-4,  # relative and absolute, of the solver
                "num_steps": placeholder(int),  # of a fixed solver
                "likelihood_examples": 100,  # held-out images whose bits per dimension are measured
                "divergence": "hutchinson",  # of the likelihood: unbiased; exact costs a product an entry of an image
                "likelihood_samples": 1,  # draws of the dequantisation
                "seed": 1000,
            }
        )
        return config

    def __init__(self, config: ConfigDict, mesh: Mesh):
        super().__init__(config, mesh)
        check_choices(config, {"model.name": MODELS, "eval.reference": image_evaluation.SPLITS})
        if config.coupling.name == "sinkhorn":
            raise UserError(
                "coupling.name is 'sinkhorn', which pairs across classes, expected independent or exact: change it."
            )
        likelihood.check_divergence(config.eval.divergence)
        if config.eval.guidance != 1.0 and not config.model.label_dropout > 0:
            raise UserError(
                f"eval.guidance is {config.eval.guidance} with model.label_dropout={config.model.label_dropout}, "
                "expected guidance 1, or a share of labels to drop in training: guidance needs a model that is also "
                "trained without labels."
            )
        self.label_dropout = config.model.label_dropout

    @property
    @abc.abstractmethod
    def data(self) -> ImageData:
        """The images."""

    @functools.cached_property
    def evaluation(self) -> ImageEvaluation:
        """The evaluation of models on the data."""
        return ImageEvaluation(self.data, self.path, self.config.data, self.config.eval, self.mesh)

    def velocity_model(self, **condition: Any) -> UNet | DiT:
        """Returns a new model with the config's sizes; `condition` is its num_classes or vector_width."""
        settings = self.config.model
        make_model, make_config = MODELS[settings.name]
        sizes = dict(settings[settings.name])
        if settings.name == "unet":
            sizes["multipliers"] = sizes["multipliers"] or (1, 2)
        dtype = self.config.compute_dtype
        sizes |= {"dropout": settings.dropout, "remat": settings.remat, **condition}
        sizes["dtype"] = None if dtype == "float32" else dtype
        try:
            config = make_config(image_size=self.size, channels=self.channels, **sizes)
            return make_model(config, rngs=nnx.Rngs(self.config.seed))
        except ValueError as error:
            raise UserError(f"model.{settings.name}: {error}") from None

    def train_source(self) -> ImagePairs:
        """Returns pairs of noise and training images."""
        data = self.config.data
        return ImagePairs(
            self.data,
            data.dequantize,
            self.config.coupling.name,
            self.config.seed,
            group=self.config.coupling.group,
            flip=data.flip,
            on_error=data.on_error,
            max_bad_fraction=data.max_bad_fraction,
        )

    def reported_data(self) -> str:
        """Returns the fingerprint of the held-out split."""
        return self.data.held_out.fingerprint

    def blank_row(self) -> dict[str, np.ndarray]:
        """Returns a row of zeros with the keys, shapes and dtypes of the training source."""
        image = np.zeros((self.size, self.size, self.channels), np.float32)
        row = {"x_0": image, "x_1": image, "weight": np.zeros((), np.float32)}
        return row | {"label": np.zeros((), np.int32)} if self.num_classes else row

    def describe_batch(self, batch: dict[str, np.ndarray]) -> str:
        """Returns the shape of the images, and their labels."""
        labels = f"labels: {batch['label'][0].tolist()}" if "label" in batch else "without labels"
        return f"{batch['x_1'][0].shape} images, {labels}"

    def validate(self, model: nnx.Module) -> dict[str, float]:
        """Returns the Frechet distance of some samples."""
        return self.evaluation.validate(own_copy(model))

    def evaluate(
        self, model: nnx.Module, workdir: Path, split: str | None = None, control_results=None
    ) -> dict[str, Any]:
        """Returns the content of `eval.json` and draws figures; see ImageEvaluation.evaluate."""
        return self.evaluation.evaluate(own_copy(model), workdir)
