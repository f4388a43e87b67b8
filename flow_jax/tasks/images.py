"""Trains and evaluates a flow from noise to images, with or without labels."""

import dataclasses
import functools

from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flow_jax.data import image_datasets
from flow_jax.data.image_datasets import ImageData, ImageDataKeys
from flow_jax.tasks.image_flow_task import ImageFlowKeys, ImageFlowTask
from train_jax.core.config_keys import section
from train_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Keys(ImageFlowKeys):
    """The keys of the task."""

    data: ImageDataKeys = section(ImageDataKeys)


class ImageFlow(ImageFlowTask):
    """A flow from noise to the images that `config.data` names."""

    keys = Keys

    def __init__(self, config: ConfigDict, mesh: Mesh):
        super().__init__(config, mesh)
        image_datasets.check_name(config.data.name)
        if config.eval.guidance != 1.0 and not config.data.conditional:
            raise UserError(
                f"eval.guidance is {config.eval.guidance} with data.conditional=False, expected 1: guidance needs "
                "labels."
            )
        self.size, self.channels, _ = image_datasets.shape(config.data)
        self.model_config()  # checks sizes before the data are opened

    @functools.cached_property
    def data(self) -> ImageData:
        """The images."""
        return image_datasets.open_data(self.config.data)

    @functools.cached_property
    def num_classes(self) -> int:
        """The number of classes, 0 without labels; the data are opened if the config does not determine it."""
        number = image_datasets.known_classes(self.config.data)
        return self.data.num_classes if number is None else number

    def init(self) -> nnx.Module:
        """Returns the velocity model at the start of training."""
        return self.velocity_model(num_classes=self.num_classes)
