"""Pretrains the small base's vision tower alone, to predict from every patch the attributes that it shows.

An image takes a fifth of the time that it takes with its texts (task.py), and the texts teach little before the tower
distinguishes a cube from a cylinder. So the tower learns that first.
"""

import functools
import math
from collections.abc import Callable

import jax
import numpy as np

from paligemma_jax.data.sources.pretraining_scenes import PretrainingScenes
from paligemma_jax.tasks.pretraining.scene_task import PretrainingModel, SceneTask, patch_loss
from train_jax.core import metrics
from train_jax.core.data_source import DataSource
from train_jax.core.metrics import Metrics, row_count


class Patches(DataSource):
    """Rows of one image and the attributes of its patches; every second view is mirrored left to right."""

    def __init__(self, scenes: PretrainingScenes, num_scenes: int):
        self._scenes, self._num_scenes = scenes, num_scenes

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        image, patches, _ = self._scenes.read(index)
        if index // self._num_scenes % 2:
            grid = math.isqrt(len(patches))
            image = image[:, ::-1]
            patches = patches.reshape(grid, grid, -1)[:, ::-1].reshape(patches.shape)
        return {"image": image, "patches": patches}


class VisionPretraining(SceneTask):
    """Pretrains the vision tower; see the module. `init_from` of Pretraining names runs of this task."""

    def trainable(self) -> str:
        """Returns the pattern of the tower and the patch heads."""
        return r"model/vision/.*|patch_heads/.*"

    def _source(self, stream: str, num_scenes: int, views: int) -> Patches:
        scenes = PretrainingScenes(self.rendered(stream, num_scenes), views, num_segments=0)
        return Patches(scenes, num_scenes)

    def train_source(self) -> Patches:
        """Returns the training rows, each scene also mirrored."""
        return self._source("pretraining", self.config.data.num_scenes, views=2)

    def normalizer(self, batch) -> jax.Array:
        """Returns the number of images."""
        return row_count(batch, "image")

    def loss(self, model: PretrainingModel, batch, keys=None) -> tuple[jax.Array, Metrics]:
        """Returns the patch loss times the number of images, and accuracies on patches of objects."""
        tower, _ = model.model.vision(self.normalize(batch["image"]))
        loss, metrics = patch_loss(model.patch_heads, tower, batch["patches"])
        return loss * len(tower), metrics

    def validate(self, model: PretrainingModel) -> dict[str, float]:
        """Returns the accuracies of the patch heads on patches of objects, on held-out scenes."""
        source = self._source("pretraining-held-out", self.config.data.num_held_out, views=1)
        rows = [source[index] for index in range(len(source))]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return metrics.means(self._score(model, batch))

    @functools.cached_property
    def _score(self) -> Callable[..., Metrics]:
        """Returns the metrics of a batch; compiled once, however often the run evaluates."""
        return jax.jit(lambda model, batch: self.loss(model, batch)[1])
