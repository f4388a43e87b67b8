"""Exact optimal transport on the host: assignments between clouds of one size, and plans for any weights.

scipy's linear_sum_assignment adds rows one by one along shortest augmenting paths, which are long if the cost is far
from reduced. Subtracting a potential from each row and each column does not change the optimum; with potentials from a
short entropic solve nearly every path is a single edge.
"""

import numpy as np
import scipy.optimize
import scipy.sparse
from jaxtyping import Float, Int, Num

from flow_jax.argument_checks import check_numbers
from flow_jax.arrays import Number
from train_jax.core.errors import UserError

REDUCE_FROM = 256  # rows; the reduction does not pay for fewer
EPSILONS = (0.1, 0.02, 0.004)  # of the stages, in standard deviations of the cost
# Of the iterations of a stage: 1 is Sinkhorn's step, above 1 is over-relaxed (Thibault et al. 2021), which may diverge
# far from the solution.
RELAXATIONS = (1.0, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5)
FLOOR = -60.0  # of the kernel's exponents: subnormal numbers would make the products many times slower
LOG_BOUND = 69.0  # of the scalings: 1e-30 to 1e30, within the range of float32


def assign(cost: Float[np.ndarray, "N M"]) -> Int[np.ndarray, " N"]:
    """Returns the permutation p that minimizes sum_i cost[i, p[i]].

    Raises:
      UserError: the matrix is not square, or has entries that are not finite.
    """
    check_numbers("the cost", cost)
    cost = np.asarray(cost)
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1]:
        raise UserError(f"an exact coupling pairs two batches of one size, got a cost of shape {cost.shape}.")
    if not np.isfinite(cost).all():
        raise UserError("the cost of a coupling has entries that are not finite: check the data for NaN and infinity.")
    reduced = reduce_cost(cost) if len(cost) >= REDUCE_FROM else cost
    return scipy.optimize.linear_sum_assignment(reduced)[1]


def reduce_cost(cost: Float[np.ndarray, "N N"]) -> Float[np.ndarray, "N N"]:
    """Subtracts a potential of each row and column; the result is >= 0, and near zero where an optimum may use it.

    The potentials need not be exact, so Sinkhorn's iteration runs in float32. The last half steps, which subtract the
    minimum of each row and then of each column, have the cost's precision.
    """
    std = float(cost.std())
    columns = np.zeros(cost.shape[1], cost.dtype)
    if std > 0:
        for epsilon in EPSILONS:
            columns = columns + _column_potential(cost - columns[None], epsilon * std)
    reduced = cost - columns[None]
    reduced -= reduced.min(axis=1, keepdims=True)
    reduced -= reduced.min(axis=0, keepdims=True)
    return reduced


def _column_potential(cost, epsilon: Number):
    """Returns column potentials after some iterations of Sinkhorn's algorithm; they are bounded for any cost."""
    kernel = np.subtract(cost, cost.min(axis=1, keepdims=True), dtype=np.float32)
    kernel *= np.float32(-1 / epsilon)
    np.exp(np.maximum(kernel, np.float32(FLOOR), out=kernel), out=kernel)
    log_u, log_v = (np.zeros(size, np.float32) for size in cost.shape)
    # einsum instead of @: BLAS would start threads for this short work, which compete with a training step for cores.
    for relaxation in RELAXATIONS:
        log_u = _scaled(log_u, np.einsum("ij,j->i", kernel, np.exp(log_v)), relaxation)
        log_v = _scaled(log_v, np.einsum("ij,i->j", kernel, np.exp(log_u)), relaxation)
    return epsilon * log_v.astype(cost.dtype)


def _scaled(log_scale, sums, relaxation: float):
    """Returns the updated logarithm of a scaling; with relaxation 1 it makes the sums 1."""
    excess = log_scale + np.log(np.clip(sums, 1e-30, 1e30))
    return np.clip(log_scale - relaxation * excess, -LOG_BOUND, LOG_BOUND)


def transport(
    cost: Float[np.ndarray, "N M"], a: Num[np.ndarray, "..."] | None = None, b: Num[np.ndarray, "..."] | None = None
) -> Float[np.ndarray, "N M"]:
    """Returns the plan P that minimizes sum P cost, with row sums a and column sums b, uniform if None.

    Equal sizes with uniform weights are solved as an assignment, others as a linear program (HiGHS), which is meant for
    a few thousand rows at most.

    Raises:
      UserError: weights are negative, differ in their sums or do not match the cost; or the cost is not finite.
    """
    check_numbers("the cost", cost)
    cost = np.asarray(cost)
    if cost.ndim != 2 or not cost.size or not np.isfinite(cost).all():
        raise UserError(f"the cost has shape {list(cost.shape)}, expected a matrix of finite entries.")
    for weights in (a, b):
        if weights is not None:
            check_numbers("weights", weights)
    n, m = cost.shape
    if n == m and a is None and b is None:
        plan = np.zeros((n, m))
        plan[np.arange(n), assign(cost)] = 1 / n
        return plan
    a = np.full(n, 1 / n) if a is None else np.asarray(a, np.float64)
    b = np.full(m, 1 / m) if b is None else np.asarray(b, np.float64)
    if (a.shape, b.shape) != ((n,), (m,)):
        raise UserError(
            f"weights have shapes {list(a.shape)} and {list(b.shape)} for a cost of {[n, m]}, expected a number for "
            "each of its rows and of its columns."
        )
    if not min(a.min(), b.min()) >= 0 or not np.isclose(a.sum(), b.sum(), rtol=1e-6):
        raise UserError(f"weights sum to {a.sum():g} and {b.sum():g}, expected equal sums of numbers >= 0.")
    balanced_b = b * (a.sum() / b.sum())
    rows = scipy.sparse.kron(scipy.sparse.eye_array(n), np.ones((1, m)))
    columns = scipy.sparse.kron(np.ones((1, n)), scipy.sparse.eye_array(m))
    # The sum of the last column follows from the others.
    sums = scipy.sparse.vstack([rows, columns.tocsr()[:-1]]).tocsr()
    result = scipy.optimize.linprog(
        np.asarray(cost, np.float64).ravel(), A_eq=sums, b_eq=np.concatenate([a, balanced_b[:-1]]), method="highs"
    )
    if result.x is None:
        raise RuntimeError(f"the transport problem was not solved: {result.message}")
    return result.x.reshape(n, m)
