"""Trains a flow between two distributions in the plane, and scores it: the runtime's Task (train_jax/task.py).

The velocity model learns the conditional velocity dx_t of its path (Lipman et al. 2023, equation 14), pairs being
coupled as the config says (Tong et al. 2024). Scores are in evaluation.py.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from flow_jax import couplings, evaluation, losses, paths
from flow_jax import times as times_of
from flow_jax.models.mlp import MLP, MLPConfig
from flow_jax.pairs import COUPLINGS, ToyPairs
from flow_jax.toys import TOYS
from train_jax.errors import UserError
from train_jax.metrics import Metrics
from train_jax.task import Blueprint

PATHS = {
    "cond_ot": lambda config: paths.CondOT(sigma_min=config.sigma_min),
    "cfm": lambda config: paths.CFM(config.sigma),
    "vp": lambda config: paths.VP(config.beta_min, config.beta_max),
    "cosine": lambda config: paths.Cosine(),
    "schroedinger_bridge": lambda config: paths.SchrodingerBridge(config.sigma),
}
STOCHASTIC = ("cfm", "schroedinger_bridge")  # paths that need noise of their own
TIMES = {
    "uniform": times_of.Uniform,
    "stratified": times_of.Stratified,
    "logit_normal": lambda low, high: times_of.LogitNormal(),
}


class PlaneFlow:
    """The task; see the module."""

    harmless_keys = (r"eval\..*",)
    validation_metrics = ("w2",)
    model_keys = (r"model\..*", r"path\..*")

    @staticmethod
    def defaults() -> ConfigDict:
        config = ConfigDict()
        config.model = ConfigDict({"width": 256, "depth": 4, "activation": "silu"})
        config.path = ConfigDict(
            {
                "name": "cond_ot",  # cond_ot | cfm | vp | cosine | schroedinger_bridge
                "sigma_min": 0.0,  # of cond_ot: standard deviation of what is left around a data point at t = 1
                "sigma": 0.1,  # of cfm and schroedinger_bridge: noise around the line
                "beta_min": 0.1,  # of vp
                "beta_max": 20.0,
            }
        )
        config.coupling = ConfigDict(
            {
                "name": "independent",  # independent | exact (on the host, ahead of the step) | sinkhorn (in the step)
                "epsilon": 0.05,  # of sinkhorn, in standard deviations of the squared distances
            }
        )
        config.times = "uniform"  # uniform | stratified | logit_normal
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
        for key, value, known in (
            ("path.name", config.path.name, PATHS),
            ("coupling.name", config.coupling.name, COUPLINGS),
            ("times", config.times, TIMES),
            ("data.name", config.data.name, TOYS),
            ("data.noise", config.data.noise, TOYS),
        ):
            if value not in known:
                raise UserError(f"{key} is {value!r}, expected one of {', '.join(known)}: change it.")
        if config.micro_batch not in (None, config.batch_size) and config.coupling.name == "sinkhorn":
            raise UserError(
                f"micro_batch is {config.micro_batch} beside coupling.name='sinkhorn', which pairs the rows of a step: "
                "set micro_batch=None."
            )
        self.config, self.mesh = config, mesh
        self.path = PATHS[config.path.name](config.path)
        self.times = TIMES[config.times](*self.path.time_range)

    @classmethod
    def blueprint(cls, config: ConfigDict, mesh: Mesh) -> Blueprint:
        """Shapes of a run, for the plan command. What an evaluation computes is less than the training step."""
        task = cls(config, mesh)
        point = jax.ShapeDtypeStruct((2,), jnp.float32)
        return Blueprint(task, nnx.eval_shape(task.init), {"x_0": point, "x_1": point}, {})

    def init(self) -> nnx.Module:
        return MLP(MLPConfig(dim=2, **self.config.model), rngs=nnx.Rngs(self.config.seed))

    def trainable(self) -> str:
        return r".*"

    def sharding_rules(self):
        return ((r".*", ()),)

    def train_source(self) -> ToyPairs:
        config = self.config
        return ToyPairs(
            config.data.name,
            config.data.noise,
            config.data.num_examples,
            config.coupling.name,
            config.seed,
            jax.process_index(),
        )

    def normalizer(self, batch) -> jax.Array:
        A, b = batch["x_1"].shape[:2]
        return jnp.float32(A * b)

    def loss(self, model: nnx.Module, batch, keys) -> tuple[jax.Array, Metrics]:
        """The conditional flow-matching loss, summed over rows."""
        x_0, x_1 = batch["x_0"], batch["x_1"]
        pairs, draws, noise = jax.random.split(keys[0], 3)
        if self.config.coupling.name == "sinkhorn":
            i, j = couplings.sinkhorn(x_0, x_1, self.config.coupling.epsilon, pairs)
            x_0, x_1 = x_0[i], x_1[j]
        t = self.times.draw(draws, len(x_1))
        sample = self.path.sample(x_0, x_1, t, key=noise if self.config.path.name in STOCHASTIC else None)
        return losses.conditional_flow_matching(model, sample).sum(), {}

    def describe_batch(self, batch: dict[str, np.ndarray]) -> str:
        rows = zip(batch["x_0"][0], batch["x_1"][0], strict=True)
        return "\n".join(f"{x_0} -> {x_1}" for x_0, x_1 in rows)

    def validate(self, model: nnx.Module) -> dict[str, float]:
        config = self.config
        return {"w2": evaluation.distance(model, config.data, config.eval, config.eval.validation_draws).value}

    def evaluate(self, model: nnx.Module, workdir: Path, split: str | None = None) -> dict[str, Any]:
        return evaluation.evaluate(model, self.config.data, self.config.eval, workdir)
