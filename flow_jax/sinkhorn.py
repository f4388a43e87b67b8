"""Entropic optimal transport by Sinkhorn's iteration in the log domain, jitted.

It minimises <P, M> + epsilon KL(P | a b^T) over plans P with marginals a and b. The useful size of epsilon follows the
*spread* of the cost: in high dimension all costs lie close to a large mean, and a fraction of the mean is so much
smoothing that the plan is nearly independent while the iteration converges at once. `relative_epsilon` scales by the
standard deviation; `Solution.relative_entropy` tells how sharp a plan is, which "converged" does not.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from flow_jax.arrays import AnyArray, Scalar, flatten_rows

CHECK_EVERY = 10  # iterations between looks at the marginals


def squared_distances(x: Float[AnyArray, "N ..."], y: Float[AnyArray, "M ..."]) -> Float[Array, "N M"]:
    """|x_i - y_j|^2 over all axes of an example, on the device."""
    x, y = flatten_rows(jnp.asarray(x)), flatten_rows(jnp.asarray(y))
    centre = y.mean(axis=0, keepdims=True)  # small numbers cancel less
    x, y = x - centre, y - centre
    products = jnp.matmul(x, y.T, precision=lax.Precision.HIGHEST)
    return jnp.maximum((x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * products, 0)


def relative_epsilon(cost: Float[Array, "N M"], epsilon: Scalar) -> Float[Array, ""]:
    """epsilon times the standard deviation of the cost: absolute, in the cost's units; epsilon if all are equal."""
    spread = cost.std()
    return epsilon * jnp.where(spread > 0, spread, 1.0)


class Solution(NamedTuple):
    """Potentials of an entropic problem; the plan is exp((f_i + g_j - M_ij) / epsilon).

    Attributes:
      f, g: [N] and [M].
      epsilon: absolute.
      error: sum of |row sum - a| at the end; column sums are exact.
      iterations: of both half steps.
      converged: error is at most the tolerance.
    """

    f: Float[Array, " N"]
    g: Float[Array, " M"]
    epsilon: Float[Array, ""]
    error: Float[Array, ""]
    iterations: Int[Array, ""]
    converged: Bool[Array, ""]

    def log_plan(self, cost: Float[AnyArray, "N M"]) -> Float[Array, "N M"]:
        return (self.f[:, None] + self.g[None] - cost) / self.epsilon

    def plan(self, cost: Float[AnyArray, "N M"]) -> Float[Array, "N M"]:
        """The plan [N, M], of sum 1 for weights of sum 1."""
        return jnp.exp(self.log_plan(cost))

    def transport_cost(self, cost: Float[AnyArray, "N M"]) -> Float[Array, ""]:
        """<P, M>."""
        return (self.plan(cost) * cost).sum()

    def objective(self, cost: Float[AnyArray, "N M"]) -> Float[Array, ""]:
        """<P, M> + epsilon sum P (log P - 1)."""
        plan = self.plan(cost)
        return (plan * cost).sum() + self.epsilon * (plan * (self.log_plan(cost) - 1)).sum()

    def regularized_cost(self, cost: Float[AnyArray, "N M"]) -> Float[Array, ""]:
        """<P, M> + epsilon KL(P | a b^T), with the plan's own marginals for a and b."""
        plan = self.plan(cost)
        product = jnp.log(plan.sum(axis=1))[:, None] + jnp.log(plan.sum(axis=0))[None]
        return (plan * cost).sum() + self.epsilon * (plan * (self.log_plan(cost) - product)).sum()

    def relative_entropy(self, cost: Float[AnyArray, "N M"]) -> Float[Array, ""]:
        """Where the plan's entropy lies between a permutation's (0) and the independent plan's (1).

        (H(P) - max(H(a), H(b))) / min(H(a), H(b)), of uniform weights and N = M: H(P) / log N - 1.
        """
        plan = self.plan(cost)

        def entropy(p):
            return jax.scipy.special.entr(p).sum()

        rows, columns = entropy(plan.sum(axis=1)), entropy(plan.sum(axis=0))
        return (entropy(plan) - jnp.maximum(rows, columns)) / jnp.minimum(rows, columns)


@functools.partial(jax.jit, static_argnames="max_iterations")
def solve(
    cost: Float[AnyArray, "N M"],
    epsilon: Scalar,
    a: Float[AnyArray, " N"] | None = None,
    b: Float[AnyArray, " M"] | None = None,
    *,
    tolerance: Scalar = 1e-3,
    max_iterations: int = 20_000,
) -> Solution:
    """Solves the entropic problem.

    Args:
      cost: [N, M]; computed in its dtype.
      epsilon: absolute, in the units of the cost (see `relative_epsilon`).
      a, b: weights, uniform when None.
      tolerance: of the sum of |row sum - a|; float32 reaches some 1e-5.
      max_iterations: where the iteration stops all the same.
    """
    n, m = cost.shape
    dtype = cost.dtype
    log_a = jnp.full((n,), -jnp.log(n), dtype) if a is None else jnp.log(jnp.asarray(a, dtype))
    log_b = jnp.full((m,), -jnp.log(m), dtype) if b is None else jnp.log(jnp.asarray(b, dtype))
    epsilon = jnp.asarray(epsilon, dtype)
    scaled = cost / epsilon

    def iterate(_, carry):
        _, f, _ = carry
        g = log_b - jax.nn.logsumexp(f[:, None] - scaled, axis=0)
        return f, log_a - jax.nn.logsumexp(g[None] - scaled, axis=1), g

    def block(carry):
        potentials, _, count = carry
        used, f, g = lax.fori_loop(0, CHECK_EVERY, iterate, potentials)
        error = jnp.abs(jnp.exp(log_a) * jnp.expm1(used - f)).sum()  # the row sums of (used, g) against a
        return (used, f, g), error, count + CHECK_EVERY

    def unfinished(carry):
        _, error, count = carry
        return (error > tolerance) & (count < max_iterations)  # NaN stops: no iteration repairs it

    start = (jnp.zeros((n,), dtype), jnp.zeros((n,), dtype), jnp.zeros((m,), dtype))
    (f, _, g), error, count = lax.while_loop(unfinished, block, block((start, jnp.zeros((), dtype), jnp.int32(0))))
    return Solution(epsilon * f, epsilon * g, epsilon, error, count, error <= tolerance)
