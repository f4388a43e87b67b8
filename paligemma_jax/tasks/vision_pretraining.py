"""The warm start of the small base's vision tower: every patch tells what it shows, without any text.

A picture costs a fifth of what it costs with its texts (tasks/pretraining.py), and the texts teach little before the
tower can tell a cube from a cylinder; so the tower learns that first, on its own.
"""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from paligemma_jax.data.pretraining_set import PretrainingScenes
from paligemma_jax.models.paligemma import variant
from paligemma_jax.tasks import common
from paligemma_jax.tasks.pretraining import PretrainingModel, initial_model, normalize, patch_loss, rendered
from train_jax import metrics
from train_jax.metrics import Metrics


class Patches:
    """Rows of one image and what each of its patches shows; every second view is mirrored, left for right."""

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


class VisionPretraining:
    """The task; see the module. Its runs are what Pretraining's `init_from` names."""

    harmless_keys = (r"data\.(build_workers|cache_dir)",)

    @staticmethod
    def defaults() -> ConfigDict:
        config = ConfigDict()
        config.model = ConfigDict({"variant": "tiny", "remat": "none", "unroll": True})
        config.init_from = ()  # as in Pretraining
        config.data = ConfigDict(
            {"cache_dir": common.cache_dir(), "num_scenes": 20_000, "build_workers": 2, "num_held_out": 200}
        )
        return config

    def __init__(self, config: ConfigDict, mesh):
        self.config = config
        self.model_config = variant(config.model.variant).replace(
            both=dict(dtype=config.compute_dtype, remat=config.model.remat, unroll=config.model.unroll)
        )

    def init(self) -> nnx.Module:
        return initial_model(self.model_config, self.config.seed, self.config.init_from)

    def trainable(self) -> str:
        return r"model/vision/.*|patch_heads/.*"

    def sharding_rules(self):
        return common.SHARDING_RULES

    def _source(self, stream: str, num_scenes: int, views: int) -> Patches:
        folder = rendered(self.config.data, self.model_config.vision, stream, num_scenes)
        return Patches(PretrainingScenes(folder, views, num_segments=0), num_scenes)

    def train_source(self):
        return self._source("pretraining", self.config.data.num_scenes, views=2)

    def normalizer(self, batch) -> jax.Array:
        A, b = batch["image"].shape[:2]
        return jnp.float32(A * b)

    def loss(self, model: PretrainingModel, batch, keys) -> tuple[jax.Array, Metrics]:
        tower, _ = model.model.vision(normalize(batch["image"]))
        loss, metrics = patch_loss(model.patch_heads, tower, batch["patches"])
        return loss * len(tower), metrics

    def validate(self, model: PretrainingModel) -> dict[str, float]:
        """Accuracy of the patch heads on held-out scenes, on patches that show an object."""
        source = self._source("pretraining-held-out", self.config.data.num_held_out, views=1)
        score = jax.jit(lambda model, batch: self.loss(model, batch, None)[1])
        rows = [source[index] for index in range(len(source))]
        return metrics.means(score(model, {name: np.stack([row[name] for row in rows]) for name in rows[0]}))

    def evaluate(self, model: PretrainingModel, workdir: Path, split: str | None = None) -> dict[str, Any]:
        return self.validate(model)
