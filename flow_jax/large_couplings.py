"""Couplings beyond one batch, by ott-jax (the extra `[ot]`).

`fit_semidiscrete` solves once for a whole data set: a potential for every example, after which each fresh row of noise
finds its partner by itself, with no batch to wait for and the noise's law untouched (semidiscrete flow matching, 2025).
`sharded_sinkhorn` couples large batches whose rows, and those of the cost, lie on several devices.
"""

import functools
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from flow_jax import sinkhorn
from flow_jax.arrays import AnyArray, Number, RandomKey, Rows, Scalar, flatten_rows
from train_jax.errors import UserError

MISSING = "this coupling needs ott-jax, which is not installed: pip install 'paligemma-jax[ot]'."
SAMPLE = 1024  # rows that tell the spread of the cost
BLOCK = 256  # rows of noise matched with the data set at a time


def relative_to_absolute(x_0: Rows, x_1: Float[AnyArray, "M ..."], epsilon: Scalar) -> Scalar:
    """epsilon standard deviations of the squared distances, from the first rows."""
    return sinkhorn.relative_epsilon(sinkhorn.squared_distances(x_0[:SAMPLE], x_1[:SAMPLE]), epsilon)


def fit_semidiscrete(
    x_1: Float[AnyArray, "M ..."],
    key: RandomKey,
    *,
    num_steps: int = 2_000,
    batch_size: int = 256,
    learning_rate: Number | None = None,
    sampler: Callable | None = None,
) -> Float[Array, " M"]:
    """The dual potential of every example of a data set against noise, without entropy, by stochastic gradient ascent.

    Args:
      x_1: the data set.
      key: of the noise.
      num_steps, batch_size: of the ascent; rows of noise a step.
      learning_rate: of Adam, decayed to zero; 0.05 standard deviations of the squared distances when None.
      sampler: (key, shape, dtype) -> noise; standard normal when None.

    Returns:
      [M], for `semidiscrete_pairs`.

    Raises:
      UserError: ott-jax is missing.
    """
    point_cloud = _ott("geometry.semidiscrete_pointcloud").SemidiscretePointCloud
    problem = _ott("problems.linear.semidiscrete_linear_problem").SemidiscreteLinearProblem
    solver_class = _ott("solvers.linear.semidiscrete").SemidiscreteSolver
    x_1 = flatten_rows(jnp.asarray(x_1))
    noise = jax.random.normal(key, (SAMPLE, x_1.shape[1]), x_1.dtype)
    spread = float(relative_to_absolute(noise, x_1, 1.0))
    geometry = point_cloud(sampler or jax.random.normal, x_1, epsilon=0.0)
    rate = 0.05 * spread if learning_rate is None else learning_rate
    solver = solver_class(
        num_iterations=num_steps,
        batch_size=batch_size,
        optimizer=optax.adam(optax.cosine_decay_schedule(rate, num_steps)),
        error_eval_every=num_steps,
    )
    with jax.numpy_rank_promotion("allow"):  # ott-jax broadcasts ranks
        return jax.jit(solver)(key, problem(geometry)).g


@jax.jit
def semidiscrete_pairs(
    x_0: Rows, x_1: Float[AnyArray, "M ..."], potential: Float[AnyArray, " M"]
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """The partner of each row of noise: the j of largest potential_j - |x_0 - x_1_j|^2. Needs no ott-jax.

    Returns:
      (i, j) with i = 0, 1, ...; over much noise every example of the data set comes up equally often.
    """
    x_1 = jnp.asarray(x_1)

    def partner(row):
        return jnp.argmax(potential - sinkhorn.squared_distances(row[None], x_1)[0])

    x_0 = jnp.asarray(x_0)
    return jnp.arange(len(x_0)), lax.map(partner, x_0, batch_size=min(BLOCK, len(x_0)))


def sharded_sinkhorn(
    x_0: Rows,
    x_1: Rows,
    epsilon: Number = 0.05,
    key: RandomKey | None = None,
    *,
    mesh: Mesh | None = None,
    axis: str = "data",
    tolerance: Number = 1e-3,
    max_iterations: int = 2_000,
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """As `couplings.sinkhorn` with rows drawn, with the rows of the cost spread over the devices of a mesh.

    Args:
      x_0, x_1: noise and data.
      epsilon: in standard deviations of the squared distances.
      key: draws the partners.
      mesh, axis: where rows of noise lie; all on one device when None.
      tolerance, max_iterations: of the solver.

    Raises:
      UserError: ott-jax or the key is missing.
    """
    if key is None:
        raise UserError("sharded_sinkhorn draws partners: pass `key`.")
    point_cloud, solve = _ott("geometry.pointcloud").PointCloud, _ott("solvers.linear").solve
    x_0, x_1 = flatten_rows(jnp.asarray(x_0)), flatten_rows(jnp.asarray(x_1))
    scale = relative_to_absolute(x_0, x_1, epsilon)
    if mesh is not None:
        x_0 = jax.device_put(x_0, NamedSharding(mesh, PartitionSpec(axis)))
        x_1, scale, key = jax.device_put((x_1, scale, key), NamedSharding(mesh, PartitionSpec()))
    with jax.numpy_rank_promotion("allow"):  # ott-jax broadcasts ranks
        return _draw_partners(point_cloud, solve, tolerance, max_iterations, x_0, x_1, scale, key)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _draw_partners(point_cloud, solve, tolerance, max_iterations, x_0, x_1, epsilon, key):
    geometry = point_cloud(x_0, x_1, epsilon=epsilon)
    g = solve(geometry, threshold=tolerance, max_iterations=max_iterations).g
    logits = (g[None] - sinkhorn.squared_distances(x_0, x_1)) / epsilon
    return jnp.arange(len(x_0)), jax.random.categorical(key, logits, axis=1)


def _ott(name: str):
    """A module of ott-jax.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module(f"ott.{name}")
    except ImportError:
        raise UserError(MISSING) from None
