"""Entropic optimal transport by Sinkhorn's iteration in the log domain, jitted.

The solver minimizes <P, M> + epsilon KL(P | a b^T) over plans P with marginals a and b. A suitable epsilon is
proportional to the *standard deviation* of the cost (`relative_epsilon`): in high dimension all costs are close to a
large mean, and with a fraction of the mean as epsilon the plan is nearly independent, although the iteration converges
at once. `Solution.relative_entropy` measures how sharp a plan is, which convergence does not.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from flow_jax.argument_checks import check_number, check_numbers, check_whole, is_traced
from flow_jax.arrays import AnyArray, CheckedBatch, Scalar, check_clouds, flatten_rows, full_dtype
from train_jax.core.errors import UserError

CHECK_EVERY = 10  # iterations between two tests for convergence


def squared_distances(x: CheckedBatch, y: CheckedBatch) -> Float[Array, "N M"]:
    """Returns |x_i - y_j|^2 for examples of any shape [N, ...], [M, ...], on the device, in float32 at least.

    Raises:
      UserError: a cloud is empty, or the examples of the two differ in shape.
    """
    check_clouds(x, y)
    x, y = (flatten_rows(jnp.asarray(rows, full_dtype(rows))) for rows in (x, y))
    centre = y.mean(axis=0, keepdims=True)  # centring reduces cancellation
    x, y = x - centre, y - centre
    products = jnp.matmul(x, y.T, precision=lax.Precision.HIGHEST)
    return jnp.maximum((x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * products, 0)


def relative_epsilon(cost: Float[Array, "N M"], epsilon: Scalar) -> Float[Array, ""]:
    """Returns epsilon times the standard deviation of the cost, in the cost's units; epsilon if all costs are equal."""
    check_number("epsilon", epsilon, 0.0, above=True)
    check_numbers("the cost", cost)
    cost = jnp.asarray(cost)
    if cost.ndim != 2:
        raise UserError(f"the cost has shape {list(cost.shape)}, expected a matrix: reshape it.")
    std = cost.astype(full_dtype(cost)).std()
    return jnp.where(std > 0, std, 1.0) * epsilon


class Solution(NamedTuple):
    """The potentials of an entropic problem; its plan is exp((f_i + g_j - M_ij) / epsilon).

    Attributes:
      f, g: [N] and [M].
      epsilon: in the units of the cost.
      error: sum of |row sum - a| at the end; column sums are exact.
      iterations: number of iterations, each of two half steps.
      converged: whether the error is at most the tolerance.
    """

    f: Float[Array, " N"]
    g: Float[Array, " M"]
    epsilon: Float[Array, ""]
    error: Float[Array, ""]
    iterations: Int[Array, ""]
    converged: Bool[Array, ""]

    def log_plan(self, cost: Float[AnyArray, "N M"]) -> Float[Array, "N M"]:
        """Returns the logarithm of the plan; raises UserError if the cost has another shape than the one solved."""
        _check_marginals(cost, self.f, self.g)
        return (self.f[:, None] + self.g[None] - cost) / self.epsilon

    def plan(self, cost: Float[AnyArray, "N M"]) -> Float[Array, "N M"]:
        """Returns the plan [N, M], whose entries sum to the sum of the weights."""
        return jnp.exp(self.log_plan(cost))

    def transport_cost(self, cost: Float[AnyArray, "N M"]) -> Float[Array, ""]:
        """Returns <P, M>."""
        return (self.plan(cost) * cost).sum()

    def objective(self, cost: Float[AnyArray, "N M"]) -> Float[Array, ""]:
        """Returns <P, M> + epsilon sum P (log P - 1)."""
        plan = self.plan(cost)
        return (plan * cost).sum() + self.epsilon * (plan * (self.log_plan(cost) - 1)).sum()

    def regularized_cost(self, cost: Float[AnyArray, "N M"]) -> Float[Array, ""]:
        """Returns <P, M> + epsilon KL(P | a b^T), where a and b are the marginals of the plan."""
        plan = self.plan(cost)
        product = jnp.log(plan.sum(axis=1))[:, None] + jnp.log(plan.sum(axis=0))[None]
        return (plan * cost).sum() + self.epsilon * (plan * (self.log_plan(cost) - product)).sum()

    def relative_entropy(self, cost: Float[AnyArray, "N M"]) -> Float[Array, ""]:
        """Returns the plan's entropy on a scale from 0, a permutation, to 1, the independent plan.

        It is (H(P) - max(H(a), H(b))) / min(H(a), H(b)); for uniform weights and N = M this is H(P) / log N - 1.
        """
        plan = self.plan(cost)

        def entropy(p):
            return jax.scipy.special.entr(p).sum()

        rows, columns = entropy(plan.sum(axis=1)), entropy(plan.sum(axis=0))
        return (entropy(plan) - jnp.maximum(rows, columns)) / jnp.minimum(rows, columns)


def solve(
    cost: CheckedBatch,
    epsilon: Scalar,
    a: CheckedBatch | None = None,
    b: CheckedBatch | None = None,
    *,
    tolerance: Scalar = 1e-3,
    max_iterations: int = 20_000,
) -> Solution:
    """Minimizes <P, M> + epsilon KL(P | a b^T) over plans with marginals a and b (Cuturi 2013).

    Args:
      cost: [N, M]; the computation has its dtype, at least float32.
      epsilon: in the units of the cost (see `relative_epsilon`).
      a, b: weights [N] and [M], uniform if None.
      tolerance: largest sum of |row sum - a|; float32 reaches about 1e-5.
      max_iterations: limit at which the iteration stops without convergence.

    Raises:
      UserError: epsilon is not above 0, or the weights do not match the cost; or, unless they are traced, costs are not
        finite, or weights are negative or differ in their sums.
    """
    check_numbers("the cost", cost)
    cost = jnp.asarray(cost)
    check_number("tolerance", tolerance, 0.0)
    check_whole("max_iterations", max_iterations)
    _check_problem(cost, epsilon, a, b)
    return _solve(jnp.asarray(cost, full_dtype(cost)), epsilon, a, b, tolerance, max_iterations)


def _check_marginals(cost, a, b) -> None:
    shapes = [None if weights is None else list(np.shape(weights)) for weights in (a, b)]
    n, m = cost.shape if np.ndim(cost) == 2 else (0, 0)
    if not n * m or shapes[0] not in (None, [n]) or shapes[1] not in (None, [m]):
        raise UserError(
            f"a cost of shape {list(np.shape(cost))} has weights or potentials of {shapes[0]} and {shapes[1]}, "
            "expected a matrix, and a number for each of its rows and of its columns."
        )


def _check_problem(cost, epsilon, a, b) -> None:
    for weights in (a, b):
        if weights is not None:
            check_numbers("weights", weights)
    _check_marginals(cost, a, b)
    check_number("epsilon", epsilon)
    if not is_traced(epsilon) and not 0 < epsilon < np.inf:
        raise UserError(f"epsilon is {float(epsilon):g}, expected a number above 0; couplings.exact has no epsilon.")
    if not is_traced(cost) and not bool(jnp.isfinite(cost).all()):
        raise UserError(
            "the cost of a coupling has entries that are not finite: look for NaN and infinity in the data, or convert "
            "it to float32, whose range is larger than that of float16."
        )
    weights = [None if w is None or is_traced(w) else np.asarray(w, np.float64) for w in (a, b)]
    if any(w is not None and not w.min() >= 0 for w in weights):
        raise UserError("weights are negative or not numbers, expected 0 or more.")
    sums = [1.0 if w is None else w.sum() for w in weights]
    if not (is_traced(a) or is_traced(b)) and not np.isclose(*sums, rtol=1e-3):
        raise UserError(f"weights sum to {sums[0]:g} and {sums[1]:g}, expected equal sums; uniform weights sum to 1.")


@functools.partial(jax.jit, static_argnums=5)
def _solve(cost, epsilon, a, b, tolerance, max_iterations: int) -> Solution:
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
        last_f, f, g = lax.fori_loop(0, CHECK_EVERY, iterate, potentials)
        error = jnp.abs(jnp.exp(log_a) * jnp.expm1(last_f - f)).sum()  # row sums of the plan of (last_f, g), less a
        return (last_f, f, g), error, count + CHECK_EVERY

    def unfinished(carry):
        _, error, count = carry
        return (error > tolerance) & (count < max_iterations)  # stops at NaN, from which no iteration recovers

    start = (jnp.zeros((n,), dtype), jnp.zeros((n,), dtype), jnp.zeros((m,), dtype))
    (f, _, g), error, count = lax.while_loop(unfinished, block, block((start, jnp.zeros((), dtype), jnp.int32(0))))
    return Solution(epsilon * f, epsilon * g, epsilon, error, count, error <= tolerance)
