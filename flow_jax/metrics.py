"""Distances between samples, on the host in float64 but for Sinkhorn's, and properties of a flow's paths.

Point clouds are arrays of rows of any shape. Distances of two finite samples of one law are not zero: compare with the
distance between two real samples of the same sizes.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float
from scipy.spatial.distance import cdist

from flow_jax import sinkhorn
from flow_jax.arrays import AnyArray, Number, Rows, flatten_rows, sum_rows
from flow_jax.assignment import transport
from flow_jax.couplings import host_cost
from flow_jax.integrate import as_field
from flow_jax.moments import Moments, frechet
from train_jax.errors import UserError

Cloud = Float[AnyArray, "N ..."]
OtherCloud = Float[AnyArray, "M ..."]
BLOCK = 1024  # rows of a distance matrix at a time


def wasserstein(a: Cloud, b: OtherCloud, p: Number = 2) -> float:
    """The exact W_p distance, (min <P, |x - y|^p>)^(1/p), of two clouds with uniform weights.

    Equal sizes are an assignment problem, some seconds at 4,096 rows; other sizes a linear program.

    Raises:
      UserError: p < 1, or rows of other shapes.
    """
    if p < 1:
        raise UserError(f"p is {p:g}, expected at least 1: below, this is no distance.")
    x, y = _host(a), _host(b)
    if x.shape[1] != y.shape[1]:
        raise UserError(f"rows of {x.shape[1]} and {y.shape[1]} entries have no distance: make the shapes equal.")
    cost = host_cost(x, y) if p == 2 else cdist(x, y) ** p
    return float((transport(cost) * cost).sum() ** (1 / p))


def sinkhorn_divergence(a: Cloud, b: OtherCloud, epsilon: Number | None = None) -> float:
    """OT(a, b) - (OT(a, a) + OT(b, b)) / 2 of OT = min <P, |x - y|^2> + epsilon KL(P | product) (Genevay et al. 2018).

    Args:
      a, b: computed on the device in their dtype.
      epsilon: absolute, in units of squared distance; 0.05 standard deviations of the squared distances between a and b
        when None.
    """
    a, b = jnp.asarray(a), jnp.asarray(b)
    if epsilon is None:
        epsilon = float(sinkhorn.relative_epsilon(sinkhorn.squared_distances(a, b), 0.05))
    tolerance = 1e-9 if a.dtype == jnp.float64 else 1e-5

    def cost(x, y):
        distances = sinkhorn.squared_distances(x, y)
        return float(sinkhorn.solve(distances, epsilon, tolerance=tolerance).regularized_cost(distances))

    return cost(a, b) - 0.5 * (cost(a, a) + cost(b, b))


def mmd(a: Cloud, b: OtherCloud, bandwidth: Number | None = None, *, unbiased: bool = False) -> float:
    """The squared maximum mean discrepancy with the kernel exp(-|x - y|^2 / (2 bandwidth^2)) (Gretton et al. 2012).

    Args:
      a, b: clouds.
      bandwidth: the median distance between rows of a and rows of b (the first 1,024 of each) when None.
      unbiased: leave each row's kernel with itself out; the result may be negative.
    """
    x, y = _host(a), _host(b)
    if bandwidth is None:
        bandwidth = float(np.median(cdist(x[:BLOCK], y[:BLOCK])))

    def total(x, y):
        return _sum_over_pairs(x, y, lambda squares: np.exp(-squares / (2 * bandwidth**2)), "sqeuclidean")

    n, m = len(x), len(y)
    within = (total(x, x), total(y, y))
    if unbiased:
        return (within[0] - n) / (n * (n - 1)) + (within[1] - m) / (m * (m - 1)) - 2 * total(x, y) / (n * m)
    return within[0] / n**2 + within[1] / m**2 - 2 * total(x, y) / (n * m)


def energy_distance(a: Cloud, b: OtherCloud) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| over all pairs, a row's with itself included (Szekely and Rizzo 2013)."""
    x, y = _host(a), _host(b)

    def mean(x, y):
        return _sum_over_pairs(x, y, lambda distances: distances, "euclidean") / (len(x) * len(y))

    return 2 * mean(x, y) - mean(x, x) - mean(y, y)


def frechet_distance(features_a: Float[AnyArray, "N F"], features_b: Float[AnyArray, "M F"]) -> float:
    """The Frechet distance of Gaussians with the moments of any features; see moments.py, also for more than fit.

    Args:
      features_a, features_b: at least two rows each; covariances are divided by rows - 1.
    """
    return frechet(Moments.of(features_a), Moments.of(features_b))


def coverage(samples: Cloud, real: OtherCloud, neighbours: int = 5) -> float:
    """The share of real rows with a sample no farther than their `neighbours`-th nearest real one (Naeem et al. 2020).

    1 where samples are everywhere that data are; another sample of the data has about 1 - 2^-neighbours.
    """
    x, y = _host(samples), _host(real)
    radius = np.sort(cdist(y, y), axis=1)[:, neighbours]  # the first is the row itself
    return float((cdist(y, x).min(axis=1) <= radius).mean())


def path_energy(velocity: Callable, x_0: Rows, num_steps: int = 50, args: tuple = ()) -> float:
    """The mean over time and rows of |v|^2 along Euler's paths; W_2^2 of noise and samples is its least value."""
    return float(_euler_energies(*as_field(velocity), num_steps, jnp.asarray(x_0), args)[0])


def straightness(velocity: Callable, x_0: Rows, num_steps: int = 50, args: tuple = ()) -> float:
    """The mean over time and rows of |v - (x_1 - x_0)|^2 along Euler's paths (Liu et al. 2023).

    0: straight at constant speed, and one Euler step would do.

    Args:
      velocity: as of `sample`.
      x_0: noise.
      num_steps: equal steps.
      args: arrays of rows passed on to the velocity.
    """
    return float(_euler_energies(*as_field(velocity), num_steps, jnp.asarray(x_0), args)[1])


@functools.partial(jax.jit, static_argnums=(0, 2))
def _euler_energies(field, arrays, num_steps: int, x_0, args) -> tuple[Array, Array]:
    """Means of |v|^2 and of |v - (x_1 - x_0)|^2."""

    def step(x, t):
        v = field(arrays, t, x, *args).astype(x.dtype)
        return x + v / num_steps, v

    times = jnp.arange(num_steps, dtype=jnp.promote_types(x_0.dtype, jnp.float32)) / num_steps
    x_1, velocities = lax.scan(step, x_0, times)
    squares = jax.vmap(lambda v: sum_rows(v**2))
    return squares(velocities).mean(), squares(velocities - (x_1 - x_0)[None]).mean()


def _host(cloud) -> Float[np.ndarray, "N D"]:
    return flatten_rows(np.asarray(cloud, np.float64))


def _sum_over_pairs(x, y, function: Callable, metric: str) -> float:
    """Sum of a function of all distances, a block of rows at a time."""
    return float(sum(function(cdist(x[k : k + BLOCK], y, metric)).sum() for k in range(0, len(x), BLOCK)))
