"""Trains and evaluates a flow between two distributions in the plane. See flow_task.py and plane_evaluation.py."""

from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from flow_jax.data.plane_pairs import ToyPairs
from flow_jax.data.toys import TOYS
from flow_jax.models.mlp import MLP, MLPConfig
from flow_jax.tasks import plane_evaluation
from flow_jax.tasks.flow_task import FlowTask
from train_jax.config.base import check_choices
from train_jax.core.errors import UserError
from train_jax.step.placement import own_copy


class PlaneFlow(FlowTask):
    """A flow between two distributions in the plane."""

    validation_metrics = ("w2",)

    @staticmethod
    def defaults() -> ConfigDict:
        config = FlowTask.defaults()
        config.model = ConfigDict({"width": 256, "depth": 4, "activation": "silu", "time_width": 64})
        config.data = ConfigDict(
            {
                "name": "checkerboard",
                "noise": "gaussian",  # what the flow starts from; any other distribution too, for a transport of two
                "num_examples": 200_000,
            }
        )
        config.eval = ConfigDict(
            {
                "num_samples": 2000,  # points on each side of a distance
                "draws": 10,  # distances whose mean is reported
                "validation_draws": 1,  # the same in the course of training
                "solver": "dopri5",
                "tolerance": 1e-5,  # relative and absolute, of the solver
                "num_steps": placeholder(int),  # of a fixed solver
                "seed": 1000,  # of held-out data and of the noise to sample from
            }
        )
        return config

    def __init__(self, config: ConfigDict, mesh: Mesh):
        super().__init__(config, mesh)
        check_choices(config, {"data.name": TOYS, "data.noise": TOYS})

    def blank_row(self) -> dict[str, np.ndarray]:
        """Returns a row of zeros with the keys, shapes and dtypes of the training source."""
        return {name: np.zeros(2, np.float32) for name in ("x_0", "x_1")}

    def init(self) -> nnx.Module:
        """Returns the velocity model at the start of training."""
        try:
            return MLP(MLPConfig(dim=2, **self.config.model), rngs=nnx.Rngs(self.config.seed))
        except ValueError as error:
            raise UserError(f"model: {error}") from None

    def train_source(self) -> ToyPairs:
        """Returns pairs of noise and points."""
        config = self.config
        return ToyPairs(
            config.data.name,
            config.data.noise,
            config.data.num_examples,
            config.coupling.name,
            config.seed,
            config.coupling.group,
        )

    def describe_batch(self, batch: dict[str, np.ndarray]) -> str:
        """Returns one line per pair."""
        rows = zip(batch["x_0"][0], batch["x_1"][0], strict=True)
        return "\n".join(f"{x_0} -> {x_1}" for x_0, x_1 in rows)

    def validate(self, model: nnx.Module) -> dict[str, float]:
        """Returns the W2 distance between samples and held-out data."""
        data, options = self.config.data, self.config.eval
        distance = plane_evaluation.distance(own_copy(model), self.path, data, options, options.validation_draws)
        return {"w2": distance.w2}

    def evaluate(
        self, model: nnx.Module, workdir: Path, split: str | None = None, control_results=None
    ) -> dict[str, Any]:
        """Returns the content of `eval.json` and draws figures; see plane_evaluation.evaluate."""
        return plane_evaluation.evaluate(own_copy(model), self.path, self.config.data, self.config.eval, workdir)
