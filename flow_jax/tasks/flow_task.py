"""The base class of the flow-matching tasks: path, coupling and times by config, and the loss.

A velocity model learns the conditional velocity dx_t of its path (Lipman et al. 2023, equation 14), with noise and data
coupled as the config says (Tong et al. 2024).
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict

from flow_jax import losses
from flow_jax import times as times_of
from flow_jax.arrays import BatchArray
from flow_jax.couplings import pairings
from flow_jax.ode.integrate import ADAPTIVE, FIXED, TOLERANCE, SolverSettings
from flow_jax.row_keys import RowKeys, normal_rows, stream
from flow_jax.tasks import path_choice
from flow_jax.tasks.path_choice import PathKeys
from train_jax.config.base import check_declared
from train_jax.core.config_keys import key, section
from train_jax.core.errors import UserError
from train_jax.core.metrics import Metrics, row_count
from train_jax.parallel.sharding import Spec
from train_jax.step.randomness import ROW
from train_jax.task import Blueprint, Task

COUPLINGS = ("independent", "exact", "sinkhorn")
TIMES = {
    "uniform": times_of.Uniform,
    "stratified": times_of.Stratified,
    "logit_normal": lambda low, high: times_of.LogitNormal(),
}
LABELS, DROPOUT, TIME, NOISE, PAIRS = range(1, 6)  # numbers of the random streams of a row's key

_MODEL = r"(model/)?"  # a task may wrap the model, as text_to_image does
# Kernels are split over "fsdp" along their input axis, which follows the axis of a stack's layers or a convolution's
# window. Label embeddings are split along their width. The first and last layers are small and are not split. Nothing
# is split over "tensor".
SHARDING_RULES: tuple[tuple[str, Spec], ...] = (
    (_MODEL + r"layers/.*/kernel", (None, "fsdp", None)),
    (_MODEL + r"((down|up)/\d+/block|middle_in|middle_out)/(conv\d|skip)/kernel", (None, None, "fsdp", None)),
    (_MODEL + r"((down|up)/\d+/block|middle_in|middle_out)/condition/kernel", ("fsdp", None)),
    (_MODEL + r"((down|up)/\d+/attention|middle_attention)/\w+/kernel", ("fsdp", None)),
    (_MODEL + r"(condition/time_(in|out)|hidden/\d+|modulation)/kernel", ("fsdp", None)),
    (_MODEL + r"condition/(vector/kernel|.*embedding)", (None, "fsdp")),
    (r".*", ()),
)


@dataclasses.dataclass(frozen=True)
class CouplingKeys:
    """`config.coupling`: how noise and data are paired in a batch (Tong et al. 2024)."""

    name: str = key(
        "independent",
        "how noise and data are paired: at random, or by optimal transport, exact on the host ahead of the step or "
        "entropic (sinkhorn) in the step",
        choices=COUPLINGS,
    )
    epsilon: float = key(
        0.05,
        "entropic regularisation of sinkhorn, in standard deviations of the squared distances; a Schroedinger "
        "bridge has its own",
        above=0,
    )
    group: int | None = key(
        None,
        "number of rows that are paired with one another, a divisor of batch_size; None = all of the batch, which "
        "every process then reads for an exact coupling",
        minimum=1,
    )


@dataclasses.dataclass(frozen=True)
class FlowKeys:
    """The keys of every flow."""

    path: PathKeys = section(PathKeys, architecture=True)
    coupling: CouplingKeys = section(CouplingKeys)
    times: str = key("uniform", "distribution of the training times t", choices=TIMES)


@dataclasses.dataclass(frozen=True)
class SolverKeys:
    """Keys of `config.eval` of every flow: how samples are integrated; a task may have another tolerance."""

    solver: str = key(
        "dopri5", "ODE solver, of adaptive steps (dopri5, tsit5, dopri8) or of fixed steps", choices=(*FIXED, *ADAPTIVE)
    )
    tolerance: float = key(1e-4, "relative and absolute tolerance of an adaptive solver", above=0)
    num_steps: int | None = key(None, "number of steps of a fixed-step solver; None for an adaptive one", minimum=1)


class FlowTask(Task):
    """A flow-matching task; a subclass defines model, data and evaluation.

    Rows of the data have x_0 and x_1, and optionally `label` and `weight`.
    """

    keys = FlowKeys
    has_splits = False
    num_classes = 0
    label_dropout = 0.0

    def __init__(self, config: ConfigDict, mesh: Mesh):
        check_declared(config)
        check_solver(config.eval)
        if config.path.name == "schroedinger_bridge" and config.coupling.name != "sinkhorn":
            raise UserError(
                f"coupling.name is {config.coupling.name!r} with path.name='schroedinger_bridge', whose marginals are "
                "the bridge's under the entropic coupling alone, expected sinkhorn: change one of the two."
            )
        check_group(config)
        super().__init__(config, mesh)
        self.path = path_choice.make_path(config.path)
        self.times = TIMES[config.times](*self.path.time_range)

    @classmethod
    def blueprint(cls, config: ConfigDict, mesh: Mesh) -> Blueprint:
        """Returns the shapes of a run, without programs of the evaluation, which are smaller than the training step."""
        task = cls(config, mesh)
        example = {name: jax.ShapeDtypeStruct(row.shape, row.dtype) for name, row in task.blank_row().items()}
        return Blueprint(task, nnx.eval_shape(task.init), example, {})

    @abc.abstractmethod
    def blank_row(self) -> Mapping[str, np.ndarray]:
        """Returns a row of zeros with the keys, shapes and dtypes of the training source."""

    @abc.abstractmethod
    def init(self) -> nnx.Module:
        """Returns the velocity model at the start of training."""

    def trainable(self) -> str:
        """Returns a pattern for all parameters."""
        return r".*"

    def sharding_rules(self) -> Sequence[tuple[str, Spec]]:
        """Returns the rules for the models of flow_jax."""
        return SHARDING_RULES

    def normalizer(self, batch) -> jax.Array:
        """Returns the sum of the rows' weights, at least 1; the number of rows if they have no weights."""
        return row_count(batch, "x_1")

    def loss(self, model: nnx.Module, batch, keys) -> tuple[jax.Array, Metrics]:
        """Returns the conditional flow-matching loss, summed over rows and weighted if rows have weights."""
        x_0, x_1 = batch["x_0"], batch["x_1"]
        if self.config.coupling.name == "sinkhorn":
            x_0, x_1 = self._coupled(x_0, x_1, stream(keys, PAIRS))
        t = self.times.draw_rows(stream(keys, TIME), batch.get(ROW), self.config.batch_size)
        stochastic = self.config.path.name in path_choice.STOCHASTIC
        sample = self.path.sample(x_0, x_1, t, noise=normal_rows(stream(keys, NOISE), x_1) if stochastic else None)
        loss = losses.conditional_flow_matching(model, sample, *self._condition(batch, keys))
        return (loss * batch["weight"] if "weight" in batch else loss).sum(), {}

    def _coupled(self, x_0: BatchArray, x_1: BatchArray, keys: RowKeys) -> tuple[Array, Array]:
        """Pairs the rows within each group by Sinkhorn's plan, with the key of the group's first row."""
        size = self.config.coupling.group or len(x_0)

        def couple(x_0, x_1, keys):
            i, j = pairings.sinkhorn(x_0, x_1, key=keys[0], **self._entropy())
            return x_0[i], x_1[j]

        grouped = jax.tree.map(lambda rows: rows.reshape(-1, size, *rows.shape[1:]), (x_0, x_1, keys))
        paired = jax.vmap(couple)(*grouped)
        return jax.tree.map(lambda rows: rows.reshape(-1, *rows.shape[2:]), paired)

    def _entropy(self) -> dict[str, Any]:
        """Returns epsilon of the Sinkhorn coupling; for a bridge it follows from sigma (Tong et al. 2024, 4.1)."""
        if self.config.path.name == "schroedinger_bridge":
            return {"epsilon": 2 * self.config.path.sigma**2, "relative": False}
        return {"epsilon": self.config.coupling.epsilon}

    def _condition(self, batch, keys) -> tuple:
        """Returns the labels after label dropout, or None without labels; and the keys of the model's dropout."""
        labels = batch.get("label")
        if labels is not None:
            labels = losses.drop_labels(labels, self.label_dropout, self.num_classes, stream(keys, LABELS))
        return labels, stream(keys, DROPOUT)


def check_group(config: ConfigDict) -> None:
    """Raises UserError unless batch and micro-batch consist of whole groups of coupled rows."""
    name, group, batch = config.coupling.name, config.coupling.group, config.batch_size
    if group is not None and name == "independent":
        raise UserError(
            f"coupling.group is {group} beside coupling.name='independent', which pairs no rows with one another, "
            "expected None: leave one of the two out."
        )
    if group is not None and batch % group:
        raise UserError(
            f"coupling.group is {group}, expected a divisor of batch_size={batch}, so that groups fill a batch: "
            "change it, or set it to None for all rows of a batch."
        )
    micro = config.micro_batch or batch
    if name == "sinkhorn" and group is None and micro != batch:
        raise UserError(
            f"micro_batch is {micro} beside coupling.name='sinkhorn', which pairs the rows of a step: set "
            "micro_batch=None."
        )
    if name == "sinkhorn" and micro % (group or micro):
        raise UserError(
            f"micro_batch is {micro} beside coupling.name='sinkhorn', which pairs coupling.group={group} rows in the "
            f"step, expected a multiple of {group}: change one of the two."
        )


def solver_arguments(options: ConfigDict) -> dict[str, Any]:
    """Returns the solver arguments of `sample` from a config's `eval`."""
    if options.num_steps is not None:
        return {"solver": options.solver, "num_steps": options.num_steps}
    return {"solver": options.solver, "rtol": options.tolerance, "atol": options.tolerance}


def check_solver(options: ConfigDict) -> None:
    """Raises UserError if the solver of a config's `eval` is unknown or does not match its steps."""
    arguments = {"num_steps": None, "rtol": TOLERANCE, "atol": TOLERANCE} | solver_arguments(options)
    SolverSettings.make(**arguments, t0=0.0, t1=1.0, per_sample=False)
