"""What the trainers of flows share: path, coupling and times by config, and the loss (the runtime's Task).

A velocity model learns the conditional velocity dx_t of its path (Lipman et al. 2023, equation 14), pairs being coupled
as the config says (Tong et al. 2024).
"""

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flow_jax import couplings, losses, paths
from flow_jax import times as times_of
from flow_jax.integrate import TOLERANCE, Plan
from train_jax.config import check_choices
from train_jax.errors import UserError
from train_jax.metrics import Metrics
from train_jax.sharding import Spec
from train_jax.task import Blueprint

COUPLINGS = ("independent", "exact", "sinkhorn")
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

# Kernels are split over "fsdp" along their inputs; before these come the layers of a stack, or a convolution's window.
# Embeddings of labels are split along their width. What enters and leaves a model is small and stays whole, and nothing
# is split over "tensor".
SHARDING_RULES: tuple[tuple[str, Spec], ...] = (
    (r"layers/.*/kernel", (None, "fsdp", None)),
    (r"((down|up)/\d+/block|middle_in|middle_out)/(conv\d|skip)/kernel", (None, None, "fsdp", None)),
    (r"((down|up)/\d+/block|middle_in|middle_out)/condition/kernel", ("fsdp", None)),
    (r"((down|up)/\d+/attention|middle_attention)/\w+/kernel", ("fsdp", None)),
    (r"(condition/time_(in|out)|hidden/\d+|modulation)/kernel", ("fsdp", None)),
    (r"condition/(vector/kernel|.*embedding)", (None, "fsdp")),
    (r".*", ()),
)


class FlowTask(abc.ABC):
    """See the module. A subclass has model, data and evaluation; rows are x_0 and x_1, perhaps `label` and `weight`."""

    harmless_keys = (r"eval\..*",)
    single_split = True
    model_keys = (r"model\..*", r"path\..*")
    num_classes = 0
    label_dropout = 0.0

    @staticmethod
    def defaults() -> ConfigDict:
        config = ConfigDict()
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
                "epsilon": 0.05,  # of sinkhorn, in standard deviations of the squared distances; a bridge has its own
            }
        )
        config.times = "uniform"  # uniform | stratified | logit_normal
        return config

    def __init__(self, config: ConfigDict, mesh: Mesh):
        choices = {"path.name": PATHS, "coupling.name": COUPLINGS, "times": TIMES}
        check_choices(config, choices)
        check_solver(config.eval)
        if config.path.name == "schroedinger_bridge" and config.coupling.name != "sinkhorn":
            raise UserError(
                f"coupling.name is {config.coupling.name!r} with path.name='schroedinger_bridge', whose marginals are "
                "the bridge's under the entropic coupling alone, expected sinkhorn: change one of the two."
            )
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
        example = {name: jax.ShapeDtypeStruct(row.shape, row.dtype) for name, row in task.blank_row().items()}
        return Blueprint(task, nnx.eval_shape(task.init), example, {})

    @abc.abstractmethod
    def blank_row(self) -> Mapping[str, np.ndarray]:
        """A row of the training source that holds nothing, for its shapes."""

    @abc.abstractmethod
    def init(self) -> nnx.Module:
        """The velocity model at the start of training."""

    def trainable(self) -> str:
        return r".*"

    def sharding_rules(self) -> Sequence[tuple[str, Spec]]:
        return SHARDING_RULES

    def normalizer(self, batch) -> jax.Array:
        if "weight" in batch:
            return jnp.maximum(batch["weight"].sum(), 1.0)
        A, b = batch["x_1"].shape[:2]
        return jnp.float32(A * b)

    def loss(self, model: nnx.Module, batch, keys) -> tuple[jax.Array, Metrics]:
        """The conditional flow-matching loss, summed over rows, each times its weight if rows have one."""
        x_0, x_1 = batch["x_0"], batch["x_1"]
        pairs, draws, noise = jax.random.split(keys[0], 3)
        if self.config.coupling.name == "sinkhorn":
            i, j = couplings.sinkhorn(x_0, x_1, key=pairs, **self._entropy())
            x_0, x_1 = x_0[i], x_1[j]
        t = self.times.draw(draws, len(x_1))
        sample = self.path.sample(x_0, x_1, t, key=noise if self.config.path.name in STOCHASTIC else None)
        found = losses.conditional_flow_matching(model, sample, *self._condition(batch, keys))
        return (found * batch["weight"] if "weight" in batch else found).sum(), {}

    def _entropy(self) -> dict[str, Any]:
        """Epsilon of a Sinkhorn coupling; that of a bridge follows from its noise (Tong et al. 2024, section 4.1)."""
        if self.config.path.name == "schroedinger_bridge":
            return {"epsilon": 2 * self.config.path.sigma**2, "relative": False}
        return {"epsilon": self.config.coupling.epsilon}

    def _condition(self, batch, keys) -> tuple:
        """Labels, of which some are dropped, None where there are none; and keys of the model's dropout."""
        drops, dropout = (jax.vmap(lambda key, n=n: jax.random.fold_in(key, n))(keys) for n in (1, 2))
        labels = batch.get("label")
        if labels is not None:
            labels = losses.drop_labels(labels, self.label_dropout, self.num_classes, drops)
        return labels, dropout


def solver(options: ConfigDict) -> dict[str, Any]:
    """The arguments of `sample` that a config's `eval` has."""
    if options.num_steps is not None:
        return {"solver": options.solver, "num_steps": options.num_steps}
    return {"solver": options.solver, "rtol": options.tolerance, "atol": options.tolerance}


def check_solver(options: ConfigDict) -> None:
    """Raises UserError if a config's `eval` names no solver, or one that contradicts its steps."""
    chosen = {"num_steps": None, "rtol": TOLERANCE, "atol": TOLERANCE} | solver(options)
    Plan.make(**chosen, t0=0.0, t1=1.0, per_sample=False)
