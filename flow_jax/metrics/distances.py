"""Distances between samples and properties of a flow's trajectories.

Distances are computed on the host in float64, except Sinkhorn's. Point clouds are arrays [N, ...] and [M, ...] whose
examples have one shape; UserError is raised if a cloud is empty or not finite. The distance between two finite samples
of one distribution is not zero: compare with the distance between two real samples of the same sizes.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float
from scipy.spatial.distance import cdist

from flow_jax.argument_checks import check_function, check_number, check_whole
from flow_jax.arrays import (
    AnyArray,
    CheckedBatch,
    Number,
    as_rows,
    check_args,
    check_clouds,
    flatten_rows,
    full_dtype,
    sum_rows,
    velocity_at,
)
from flow_jax.callables import run
from flow_jax.couplings import entropic
from flow_jax.couplings.assignment import transport
from flow_jax.couplings.pairings import host_cost
from flow_jax.metrics.moments import Moments, frechet
from train_jax.core.errors import UserError

Cloud = Float[AnyArray, "N ..."]
OtherCloud = Float[AnyArray, "M ..."]
BLOCK = 1024  # rows of a distance matrix computed at once


def wasserstein(a: Cloud, b: OtherCloud, p: Number = 2) -> float:
    """Returns the exact W_p distance, (min <P, |x - y|^p>)^(1/p), of two clouds with uniform weights.

    Clouds of equal sizes are an assignment problem, which takes seconds for 4,096 rows; others are a linear program.

    Raises:
      UserError: p < 1.
    """
    check_number("p", p)
    if not 1 <= p < np.inf:
        raise UserError(f"p is {p:g}, expected a number of at least 1: below, this is not a distance.")
    x, y = _host(a, b)
    cost = host_cost(x, y) if p == 2 else cdist(x, y) ** p
    return float((transport(cost) * cost).sum() ** (1 / p))


def sinkhorn_divergence(a: Cloud, b: OtherCloud, epsilon: Number | None = None) -> float:
    """Returns the Sinkhorn divergence OT(a, b) - (OT(a, a) + OT(b, b)) / 2 (Genevay et al. 2018).

    Here OT = min <P, |x - y|^2> + epsilon KL(P | product of the marginals).

    Args:
      a, b: clouds; the computation is on the device, in their dtype, at least float32.
      epsilon: in units of squared distance; if None, 0.05 standard deviations of the squared distances between a and b.

    Raises:
      UserError: epsilon is not above 0, or squared distances are not finite in that dtype.
    """
    _host(a, b)
    a, b = (jnp.asarray(cloud, full_dtype(cloud)) for cloud in (a, b))
    if epsilon is not None:
        check_number("epsilon", epsilon, 0.0, above=True)
    else:
        epsilon = float(entropic.relative_epsilon(entropic.squared_distances(a, b), 0.05))
    tolerance = 1e-9 if a.dtype == jnp.float64 else 1e-5

    def cost(x, y):
        distances = entropic.squared_distances(x, y)
        return float(entropic.solve(distances, epsilon, tolerance=tolerance).regularized_cost(distances))

    return cost(a, b) - 0.5 * (cost(a, a) + cost(b, b))


def mmd(a: Cloud, b: OtherCloud, bandwidth: Number | None = None, *, unbiased: bool = False) -> float:
    """Returns the squared MMD with the kernel exp(-|x - y|^2 / (2 bandwidth^2)) (Gretton et al. 2012).

    Args:
      a, b: clouds.
      bandwidth: if None, the median distance between rows of a and rows of b (the first 1,024 of each).
      unbiased: leave out the kernel of each row with itself; the result may be negative.

    Raises:
      UserError: the bandwidth is not above 0, as for the median if more than half of the pairs are equal (if all rows
        are equal the result is 0); or `unbiased` with a single row.
    """
    x, y = _host(a, b)
    if unbiased and min(len(x), len(y)) < 2:
        raise UserError(
            f"clouds of {len(x)} and {len(y)} rows have no unbiased mmd, expected at least two rows in each."
        )
    if bandwidth is not None:
        check_number("the bandwidth of mmd", bandwidth)
    else:
        if (x == y[:1]).all() and (y == y[:1]).all():
            return 0.0
        bandwidth = float(np.median(cdist(x[:BLOCK], y[:BLOCK])))
    if not 0 < bandwidth < np.inf:
        raise UserError(f"the bandwidth of mmd is {bandwidth:g}, expected a number above 0: pass `bandwidth`.")

    def total(x, y):
        return _sum_over_pairs(x, y, lambda squares: np.exp(-squares / (2 * bandwidth**2)), "sqeuclidean")

    n, m = len(x), len(y)
    within = (total(x, x), total(y, y))
    if unbiased:
        return (within[0] - n) / (n * (n - 1)) + (within[1] - m) / (m * (m - 1)) - 2 * total(x, y) / (n * m)
    return within[0] / n**2 + within[1] / m**2 - 2 * total(x, y) / (n * m)


def energy_distance(a: Cloud, b: OtherCloud) -> float:
    """Returns 2 E|x - y| - E|x - x'| - E|y - y'| over all pairs, including x = x' (Szekely and Rizzo 2013).

    Raises:
      UserError: a cloud is empty or not finite, or the examples of the two differ in shape.
    """
    x, y = _host(a, b)

    def mean(x, y):
        return _sum_over_pairs(x, y, lambda distances: distances, "euclidean") / (len(x) * len(y))

    return 2 * mean(x, y) - mean(x, x) - mean(y, y)


def frechet_distance(features_a: CheckedBatch, features_b: CheckedBatch) -> float:
    """Returns the squared Frechet distance of Gaussians with the moments of two sets of features (Heusel et al. 2017).

    `moments.Moments` computes the moments of sets that do not fit into memory.

    Args:
      features_a, features_b: [N, F] and [M, F] with at least two rows each; covariances are divided by N - 1.

    Raises:
      UserError: there are fewer rows, or features are not vectors of one length, or not finite.
    """
    return frechet(Moments.of(features_a), Moments.of(features_b))


def coverage(samples: Cloud, real: OtherCloud, neighbours: int = 5) -> float:
    """Returns the share of real rows with a sample closer than their k-th nearest real row (Naeem et al. 2020).

    Another sample of the data has about 1 - 2^-k, where k is `neighbours`.

    Raises:
      UserError: `neighbours` is not between 1 and the number of real rows less 1.
    """
    x, y = _host(samples, real)
    check_whole("neighbours", neighbours, None)
    if not 1 <= neighbours < len(y):
        raise UserError(
            f"neighbours={neighbours} for {len(y)} real rows, expected 1 to {len(y) - 1}: pass more rows, or lower it."
        )
    radius = np.sort(cdist(y, y), axis=1)[:, neighbours]  # the first is the row itself
    return float((cdist(y, x).min(axis=1) <= radius).mean())


def path_energy(velocity: Callable, x_0: CheckedBatch, num_steps: int = 50, args: tuple = ()) -> float:
    """Returns the mean of |v|^2 over time and rows along Euler trajectories; its minimum is W_2^2 of noise and samples.

    Args:
      velocity: as in `sample`.
      x_0: noise.
      num_steps: number of equal steps.
      args: arrays that are passed to the velocity.

    Raises:
      UserError: as `straightness`.
    """
    return float(_energies(velocity, x_0, num_steps, args)[0])


def straightness(velocity: Callable, x_0: CheckedBatch, num_steps: int = 50, args: tuple = ()) -> float:
    """Returns the mean of |v - (x_1 - x_0)|^2 over time and rows along Euler trajectories (Liu et al. 2023).

    0 means straight trajectories of constant speed, for which one Euler step is exact.

    Args:
      velocity: as in `sample`.
      x_0: noise.
      num_steps: number of equal steps.
      args: arrays that are passed to the velocity.

    Raises:
      UserError: there are no steps or no rows, or the velocity does not have x's shape.
    """
    return float(_energies(velocity, x_0, num_steps, args)[1])


def _energies(velocity: Callable, x_0: CheckedBatch, num_steps: int, args: tuple) -> tuple[Array, Array]:
    """Returns the means of |v|^2 and of |v - (x_1 - x_0)|^2."""
    x_0 = as_rows("x_0", x_0)
    check_args(args, x_0)
    check_function("velocity", velocity)
    check_whole("num_steps", num_steps, None)
    if num_steps < 1 or not len(x_0):
        raise UserError(f"num_steps is {num_steps} for {len(x_0)} rows, expected at least one of each.")
    return run(_euler_energies, functools.partial(velocity_at, velocity), (num_steps,), x_0, args)


def _euler_energies(field, num_steps: int, arrays, x_0, args) -> tuple[Array, Array]:
    def step(x, t):
        v = field(arrays, t, x, *args).astype(x.dtype)
        return x + v / num_steps, v

    full = full_dtype(x_0)
    x_1, velocities = lax.scan(step, x_0, jnp.arange(num_steps, dtype=full) / num_steps)
    squares = jax.vmap(lambda v: sum_rows(v.astype(full) ** 2))
    return squares(velocities).mean(), squares(velocities - (x_1 - x_0)[None]).mean()


def _host(a, b) -> tuple[Float[np.ndarray, "N D"], Float[np.ndarray, "M D"]]:
    """Returns two clouds on the host, one vector per row, after checking their shapes and that they are finite."""
    check_clouds(a, b)
    x, y = (flatten_rows(np.asarray(cloud, np.float64)) for cloud in (a, b))
    for cloud in (x, y):
        if not np.isfinite(cloud).all():
            rows = int((~np.isfinite(cloud)).any(axis=1).sum())
            raise UserError(
                f"{rows} of {len(cloud)} rows have NaN or infinity, expected finite numbers: find where they come from."
            )
    return x, y


def _sum_over_pairs(x, y, function: Callable, metric: Literal["euclidean", "sqeuclidean"]) -> float:
    """Returns the sum of a function of all distances, computed in blocks of rows."""
    return float(sum(function(cdist(x[k : k + BLOCK], y, metric)).sum() for k in range(0, len(x), BLOCK)))
