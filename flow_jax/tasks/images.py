"""Trains a flow from noise to images, with or without labels, and scores it: the runtime's Task."""

import dataclasses
import functools

from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flow_jax.data import pictures as image_data
from flow_jax.data.pictures import ImageData, ImageDataKeys
from flow_jax.tasks.image_flow_task import ImageFlowKeys, ImageFlowTask
from train_jax.core.config_keys import section
from train_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Keys(ImageFlowKeys):
    """The keys of the task."""

    data: ImageDataKeys = section(ImageDataKeys)


class ImageFlow(ImageFlowTask):
    """The task, of the images that `config.data` names."""

    keys = Keys

    def __init__(self, config: ConfigDict, mesh: Mesh):
        super().__init__(config, mesh)
        image_data.check_name(config.data.name)
        if config.eval.guidance != 1.0 and not config.data.conditional:
            raise UserError(
                f"eval.guidance is {config.eval.guidance} with data.conditional=False, expected 1: without labels "
                "there is nothing to guide by."
            )
        self.size, self.channels, _ = image_data.shape(config.data)

    @functools.cached_property
    def data(self) -> ImageData:
        return image_data.open_data(self.config.data)

    @functools.cached_property
    def num_classes(self) -> int:
        """0 without labels; the data are opened if the config does not tell."""
        known = image_data.known_classes(self.config.data)
        return self.data.num_classes if known is None else known

    def init(self) -> nnx.Module:
        return self.velocity_model(num_classes=self.num_classes)
