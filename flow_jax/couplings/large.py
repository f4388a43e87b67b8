"""Couplings of whole data sets and of large batches, by ott-jax (the extra `[ot]`).

`fit_semidiscrete` solves once for a whole data set and returns a potential for every example. With it each row of noise
is paired by itself, without a batch, and the distribution of the noise is unchanged (semidiscrete flow matching, 2025).
`sharded_sinkhorn` couples large batches with the rows of the cost divided over several devices.
"""

import functools
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from flow_jax.argument_checks import check_key, check_number, check_numbers, check_whole
from flow_jax.arrays import (
    CheckedBatch,
    Number,
    RandomKey,
    Scalar,
    as_rows,
    check_clouds,
    check_shapes,
    flatten_rows,
    full_dtype,
    same_rows,
)
from flow_jax.callables import call_now
from flow_jax.couplings import entropic
from train_jax.core.errors import UserError

MISSING = "this coupling needs ott-jax, which is not installed: pip install 'paligemma-jax[ot]'."
SAMPLE = 1024  # rows from which the standard deviation of the cost is estimated
BLOCK = 256  # rows of noise that are paired at once


def relative_to_absolute(x_0: CheckedBatch, x_1: CheckedBatch, epsilon: Scalar) -> Scalar:
    """Returns epsilon times the standard deviation of the squared distances, estimated from the first rows."""
    return entropic.relative_epsilon(entropic.squared_distances(x_0[:SAMPLE], x_1[:SAMPLE]), epsilon)


def fit_semidiscrete(
    x_1: CheckedBatch,
    key: RandomKey,
    *,
    num_steps: int = 2_000,
    batch_size: int = 256,
    learning_rate: Number | None = None,
    sampler: Callable | None = None,
) -> Float[Array, " M"]:
    """Computes the dual potential of every example of a data set, without entropy, by stochastic gradient ascent.

    Args:
      x_1: the data set [M, ...].
      key: for the noise.
      num_steps: number of gradient steps.
      batch_size: rows of noise per step.
      learning_rate: of Adam, decayed to zero; if None, 0.05 standard deviations of the squared distances.
      sampler: (key, shape, dtype) -> noise; standard normal if None.

    Returns:
      [M], for `semidiscrete_pairs`.

    Raises:
      UserError: ott-jax is missing; the data set, `num_steps` or `batch_size` is empty or below 1; or the sampler's
        noise does not have the given shape.
    """
    x_1 = as_rows("x_1", x_1)
    check_key("key", key)
    check_whole("num_steps", num_steps, None)
    check_whole("batch_size", batch_size, None)
    if learning_rate is not None:
        check_number("learning_rate", learning_rate, 0.0, above=True)
    if not x_1.size or min(num_steps, batch_size) < 1:
        raise UserError(
            f"num_steps={num_steps} of batch_size={batch_size} for data {list(x_1.shape)}, expected 1 or more of each."
        )
    point_cloud = _ott("geometry.semidiscrete_pointcloud").SemidiscretePointCloud
    problem = _ott("problems.linear.semidiscrete_linear_problem").SemidiscreteLinearProblem
    solver_class = _ott("solvers.linear.semidiscrete").SemidiscreteSolver
    x_1 = flatten_rows(x_1.astype(full_dtype(x_1)))
    sampler = functools.partial(call_now, sampler or jax.random.normal)
    noise = jax.random.normal(key, (SAMPLE, x_1.shape[1]), x_1.dtype)
    drawn = jax.eval_shape(lambda: sampler(key, noise.shape, noise.dtype))
    check_shapes("the noise", noise, "the output of the sampler", drawn)
    std = float(relative_to_absolute(noise, x_1, 1.0))
    geometry = point_cloud(sampler, x_1, epsilon=0.0)
    rate = 0.05 * std if learning_rate is None else learning_rate
    solver = solver_class(
        num_iterations=num_steps,
        batch_size=batch_size,
        optimizer=optax.adam(optax.cosine_decay_schedule(rate, num_steps)),
        error_eval_every=num_steps,
    )
    with jax.numpy_rank_promotion("allow"):  # ott-jax broadcasts ranks
        return jax.jit(lambda *problem: solver(*problem))(key, problem(geometry)).g


def semidiscrete_pairs(
    x_0: CheckedBatch, x_1: CheckedBatch, potential: CheckedBatch
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Pairs each row of noise with the example j of largest potential_j - |x_0 - x_1_j|^2; does not need ott-jax.

    Args:
      x_0: noise [B, ...].
      x_1: the data set [M, ...].
      potential: [M], from `fit_semidiscrete`.

    Returns:
      (i, j) with i = 0, 1, ...; over many rows of noise every example of the data set is drawn equally often.

    Raises:
      UserError: the examples of x_0 and x_1 differ in shape, or the potential is not one number for each example.
    """
    check_clouds(x_0, x_1)
    check_numbers("the potential", potential)
    if np.shape(potential) != np.shape(x_1)[:1]:
        raise UserError(
            f"the potential has shape {list(np.shape(potential))} and the data {list(np.shape(x_1))}, expected a "
            "number for each row."
        )
    return _semidiscrete_pairs(*(jnp.asarray(rows) for rows in (x_0, x_1, potential)))


@jax.jit
def _semidiscrete_pairs(x_0, x_1, potential):
    def partner(row):
        return jnp.argmax(potential - entropic.squared_distances(row[None], x_1)[0])

    return jnp.arange(len(x_0)), lax.map(partner, x_0, batch_size=min(BLOCK, len(x_0)))


def sharded_sinkhorn(
    x_0: CheckedBatch,
    x_1: CheckedBatch,
    epsilon: Number = 0.05,
    key: RandomKey | None = None,
    *,
    mesh: Mesh | None = None,
    axis: str = "data",
    tolerance: Number = 1e-3,
    max_iterations: int = 2_000,
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Returns pairs as `couplings.sinkhorn` with drawn partners, with the rows of the cost divided over a mesh.

    Args:
      x_0, x_1: noise and data.
      epsilon: in standard deviations of the squared distances.
      key: draws the partners.
      mesh, axis: the mesh and its axis over which the rows of noise are divided; None for one device.
      tolerance, max_iterations: the solver stops at either.

    Raises:
      UserError: ott-jax or the key is missing, epsilon is not above 0, or the shapes differ.
    """
    if key is None:
        raise UserError("sharded_sinkhorn draws partners: pass `key`.")
    check_key("key", key)
    check_number("epsilon", epsilon)
    check_number("tolerance", tolerance, 0.0)
    check_whole("max_iterations", max_iterations)
    point_cloud, solve = _ott("geometry.pointcloud").PointCloud, _ott("solvers.linear").solve
    if not 0 < epsilon < np.inf:
        raise UserError(f"epsilon is {float(epsilon):g}, expected a number above 0; couplings.exact has no epsilon.")
    check_clouds(x_0, x_1)
    x_0, x_1 = (flatten_rows(rows.astype(full_dtype(rows))) for rows in same_rows(x_0=x_0, x_1=x_1))
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
    logits = (g[None] - entropic.squared_distances(x_0, x_1)) / epsilon
    return jnp.arange(len(x_0)), jax.random.categorical(key, logits, axis=1)


def _ott(name: str):
    """Imports a module of ott-jax.

    Raises:
      UserError: ott-jax is not installed.
    """
    try:
        return importlib.import_module(f"ott.{name}")
    except ImportError:
        raise UserError(MISSING) from None
