"""Trains and evaluates a flow between two distributions in the plane. See flow_task.py and plane_evaluation.py."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flow_jax.data import toys
from flow_jax.data.plane_pairs import ToyPairs
from flow_jax.data.toys import TOYS
from flow_jax.models.mlp import MLP, MLPConfig
from flow_jax.tasks import plane_evaluation
from flow_jax.tasks.flow_task import FlowKeys, FlowTask, SolverKeys
from train_jax.core.config_keys import key, section
from train_jax.core.errors import UserError
from train_jax.core.import_path import check_named, named
from train_jax.step.placement import own_copy


@dataclasses.dataclass(frozen=True)
class ModelKeys:
    """`config.model`: a multilayer perceptron."""

    width: int = key(256, "number of units of a hidden layer", minimum=1)
    depth: int = key(4, "number of hidden layers", minimum=1)
    activation: str = key("silu", "name of the activation, a function of jax.nn")
    time_width: int = key(64, "number of features of the time; 0 = t itself", minimum=0)


@dataclasses.dataclass(frozen=True)
class PointKeys:
    """`config.data`: distributions in the plane."""

    name: str = key(
        "checkerboard", f"distribution of the data, at t = 1: {', '.join(TOYS)}, or the import path of your own"
    )
    noise: str = key(
        "gaussian",
        "distribution at t = 0, with the choices of `name`; if it is not gaussian, the flow maps one distribution to "
        "the other",
    )
    num_examples: int = key(200_000, "number of points to train on", minimum=1)


@dataclasses.dataclass(frozen=True)
class EvalKeys(SolverKeys):
    """`config.eval`: distances between samples and held-out points."""

    num_samples: int = key(2000, "number of points on each side of a distance", minimum=6)
    draws: int = key(10, "number of distances whose mean the final evaluation reports", minimum=1)
    validation_draws: int = key(1, "number of distances whose mean an evaluation during training reports", minimum=1)
    seed: int = key(1000, "seed of the held-out points and of the noise that samples start from", minimum=0)


@dataclasses.dataclass(frozen=True)
class Keys(FlowKeys):
    """The keys of the task."""

    model: ModelKeys = section(ModelKeys, architecture=True)
    data: PointKeys = section(PointKeys)
    eval: EvalKeys = section(lambda: EvalKeys(tolerance=1e-5), resume_safe=True)


class PlaneFlow(FlowTask):
    """A flow between two distributions in the plane."""

    keys = Keys
    validation_metrics = ("w2",)

    def __init__(self, config: ConfigDict, mesh: Mesh):
        super().__init__(config, mesh)
        for side in ("name", "noise"):
            name = config.data[side]
            check_named(f"data.{side}", name, TOYS)
            if name not in TOYS:
                named(f"data.{side}", name, {})
                toys.draw(name, 2, 0)  # raises UserError for a function that draws no points
        try:
            self._model_config = MLPConfig(dim=2, **config.model)
        except ValueError as error:
            raise UserError(f"model: {error}") from None

    def blank_row(self) -> dict[str, np.ndarray]:
        """Returns a row of zeros with the keys, shapes and dtypes of the training source."""
        return {name: np.zeros(2, np.float32) for name in ("x_0", "x_1")}

    def init(self) -> nnx.Module:
        """Returns the velocity model at the start of training."""
        return MLP(self._model_config, rngs=nnx.Rngs(self.config.seed))

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
