"""Trains a flow from noise to images, with or without labels, and scores it: the runtime's Task. See flow_task.py."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from flow_jax import digits, image_evaluation
from flow_jax.flow_task import FlowTask, check_choices
from flow_jax.image_pairs import ImagePairs
from flow_jax.models.dit import DiT, DiTConfig
from flow_jax.models.unet import UNet, UNetConfig
from train_jax.errors import UserError

MODELS = {"unet": (UNet, UNetConfig), "dit": (DiT, DiTConfig)}
DATA = ("digits",)


class ImageFlow(FlowTask):
    """The task; see the module."""

    validation_metrics = ("frechet",)

    @staticmethod
    def defaults() -> ConfigDict:
        config = FlowTask.defaults()
        config.model = ConfigDict(
            {
                "name": "unet",  # unet | dit
                "dropout": 0.0,
                "label_dropout": 0.1,  # share of labels that are replaced by none, for guidance
                # multipliers of the width, one a resolution, () = (1, 2); attention at feature maps of these sides
                "unet": {"width": 32, "multipliers": (), "num_blocks": 1, "attention": (), "head_width": 32},
                "dit": {"patch_size": 2, "width": 128, "depth": 6, "num_heads": 4},
            }
        )
        config.data = ConfigDict(
            {
                "name": "digits",
                "dequantize": True,  # uniform noise of one grey value, without which there is no likelihood
            }
        )
        config.eval = ConfigDict(
            {
                "validation_samples": 200,
                "guidance": 1.0,  # of classifier-free guidance; 1 is the model itself
                "solver": "dopri5",
                "tolerance": 1e-4,  # relative and absolute, of the solver
                "num_steps": placeholder(int),  # of a fixed solver
                "likelihood_examples": 100,  # held-out images whose bits per dimension are measured
                "divergence": "hutchinson",  # of the likelihood: unbiased; or exact, at 64 times the cost
                "likelihood_samples": 1,  # draws of the dequantisation
                "seed": 1000,
            }
        )
        return config

    def __init__(self, config: ConfigDict, mesh: Mesh):
        super().__init__(config, mesh)
        check_choices(config, {"model.name": MODELS, "data.name": DATA})
        if config.coupling.name == "sinkhorn":
            raise UserError(
                "coupling.name is 'sinkhorn', which pairs across classes, expected independent or exact: change it."
            )
        self.num_classes, self.label_dropout = digits.CLASSES, config.model.label_dropout

    def init(self) -> nnx.Module:
        settings = self.config.model
        make, sizes = MODELS[settings.name]
        own = dict(settings[settings.name])
        if settings.name == "unet":
            own["multipliers"] = own["multipliers"] or (1, 2)
        try:
            size = sizes(image_size=8, channels=1, num_classes=self.num_classes, dropout=settings.dropout, **own)
            return make(size, rngs=nnx.Rngs(self.config.seed))
        except ValueError as error:
            raise UserError(f"model.{settings.name}: {error}") from None

    def train_source(self) -> ImagePairs:
        found, config = digits.load("train"), self.config
        return ImagePairs(
            found.images,
            found.labels,
            digits.LEVELS,
            config.data.dequantize,
            config.coupling.name,
            config.seed,
            jax.process_index(),
        )

    def blank_row(self) -> dict[str, np.ndarray]:
        image = np.zeros((8, 8, 1), np.float32)
        return {"x_0": image, "x_1": image, "label": np.zeros((), np.int32)}

    def describe_batch(self, batch: dict[str, np.ndarray]) -> str:
        return f"labels: {batch['label'][0].tolist()}"

    def validate(self, model: nnx.Module) -> dict[str, float]:
        return image_evaluation.validate(model, self.config.data, self.config.eval)

    def evaluate(self, model: nnx.Module, workdir: Path, split: str | None = None) -> dict[str, Any]:
        return image_evaluation.evaluate(model, self.config.data, self.config.eval, workdir)
