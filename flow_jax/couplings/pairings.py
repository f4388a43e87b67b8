"""Couplings: pair the rows of noise and data in a batch. Any coupling can be combined with any path.

Every function returns indices (i, j): x_0[i[k]] is paired with x_1[j[k]], and y_1[j] are the labels of the data. An
*exact* coupling is a permutation. The common alternative, drawing pairs from the optimal plan with replacement, is
equal in expectation but uses only 1 - 1/e of a batch's rows. `exact`, `conditional` and `within_class` run on the host,
in the input pipeline, while the device works; `sinkhorn` is jitted and may be part of a training step.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from flow_jax.argument_checks import check_key, check_number, check_numbers, check_whole, is_traced
from flow_jax.arrays import AnyArray, CheckedBatch, Number, RandomKey, Scalar, check_clouds, flatten_rows, same_rows
from flow_jax.callables import call_now
from flow_jax.couplings import entropic
from flow_jax.couplings.assignment import assign
from train_jax.core.errors import UserError

HostPairs = tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]
Conditions = Int[AnyArray, "..."] | Float[AnyArray, "..."]


def host_cost(x_0: CheckedBatch, x_1: CheckedBatch) -> Float[np.ndarray, "N M"]:
    """Returns |x_0 - x_1|^2 for examples of any shape [N, ...], [M, ...], on the host, in float32 at least.

    Raises:
      UserError: a cloud is empty, or the examples of the two differ in shape.
    """
    check_clouds(x_0, x_1)
    x, y = (flatten_rows(np.asarray(rows)) for rows in (x_0, x_1))
    x, y = (rows.astype(np.result_type(rows.dtype, np.float32), copy=False) for rows in (x, y))
    centre = y.mean(axis=0, keepdims=True)  # centring reduces cancellation
    x, y = x - centre, y - centre
    cost = (-2 * x) @ y.T
    cost += (x**2).sum(axis=1)[:, None]
    cost += (y**2).sum(axis=1)[None]
    return np.maximum(cost, 0, out=cost)


def check_pairs(i, j, n: int, m: int) -> None:
    """Raises UserError unless i and j are indices of n and m rows, of one length; JAX would clip invalid ones."""
    for name, index, rows in (("i", i, n), ("j", j, m)):
        if jnp.ndim(index) != 1 or not jnp.issubdtype(index.dtype, jnp.integer) or index.shape != i.shape:
            raise UserError(
                f"a coupling returned {i.dtype}{list(i.shape)} and {j.dtype}{list(j.shape)}, expected two lists of "
                "indices of one length."
            )
        if not is_traced(index) and index.size and not (index.min() >= 0 and index.max() < rows):
            raise UserError(f"a coupling's {name} has values from {index.min()} to {index.max()} for {rows} rows.")


def exact(x_0: CheckedBatch, x_1: CheckedBatch) -> HostPairs:
    """Returns the permutation with the least total squared distance, the coupling of OT-CFM (Tong et al. 2024).

    See also Pooladian et al. 2023.

    Args:
      x_0, x_1: noise and data with the same number of rows, of any shape.

    Returns:
      i = 0, 1, ... and the permutation j.

    Raises:
      UserError: the shapes differ, or entries are not finite.
    """
    columns = assign(host_cost(x_0, x_1))
    return np.arange(len(columns)), columns


def independent(n: int, key: RandomKey) -> tuple[Int[Array, " {n}"], Int[Array, " {n}"]]:
    """Returns random pairs in which each row occurs once."""
    check_whole("n", n, 0)
    check_key("key", key)
    return jnp.arange(n), jax.random.permutation(key, n)


def within_class(
    x_0: CheckedBatch, x_1: CheckedBatch, y_0: Int[AnyArray, "..."], y_1: Int[AnyArray, "..."]
) -> HostPairs:  # fmt: skip
    """Returns the permutation with the least total squared distance that pairs only rows with equal labels.

    A coupling that ignores labels assigns each class a part of the noise. Sampling the class from all of the noise then
    starts at points that training never saw (torchcfm's issue 117). This coupling keeps the noise of each class
    standard normal.

    Args:
      x_0, x_1: noise and data.
      y_0, y_1: labels; for the noise pass the labels of the data, in any order.

    Raises:
      UserError: a label occurs unequally often in y_0 and y_1, or there is not exactly one label for each row.
    """
    for labels in (y_0, y_1):
        check_numbers("labels", labels)
    check_clouds(x_0, x_1)
    y_0, y_1 = np.asarray(y_0), np.asarray(y_1)
    x_0, x_1 = np.asarray(x_0), np.asarray(x_1)
    if y_0.ndim != 1 or y_1.ndim != 1:
        raise UserError(
            f"labels have shapes {list(y_0.shape)} and {list(y_1.shape)}, expected one per row: or use conditional."
        )
    if len({len(x_0), len(x_1), len(y_0), len(y_1)}) > 1:
        raise UserError(
            f"there are {len(x_0)} rows of noise with {len(y_0)} labels and {len(x_1)} of data with {len(y_1)}, "
            "expected equal numbers: pass one label for each row."
        )
    columns = np.empty(len(x_0), np.int64)
    for label in np.union1d(y_0, y_1):
        rows, targets = np.flatnonzero(y_0 == label), np.flatnonzero(y_1 == label)
        if len(rows) != len(targets):
            raise UserError(
                f"label {label} has {len(rows)} rows of noise and {len(targets)} of data, expected equal numbers: "
                "pass the labels of the data for the noise."
            )
        columns[rows] = targets[assign(host_cost(x_0[rows], x_1[targets]))]
    return np.arange(len(x_0)), columns


def conditional(
    x_0: CheckedBatch, x_1: CheckedBatch, c_0: Conditions, c_1: Conditions, weight: Number = 1.0
) -> HostPairs:
    """Returns the permutation with the least squared distance plus condition cost (C2OT, Cheng and Schwing 2025).

    Args:
      x_0, x_1: noise and data.
      c_0, c_1: conditions. Integers [B] or [B, K] cost 1 if any of a row's differs; float vectors [B, ...] cost their
        squared distance. For the noise pass those of the data, in any order.
      weight: of the condition cost, in standard deviations of the squared distances. 0 is `exact`; for labels a large
        weight is `within_class`.

    Raises:
      UserError: as `exact`; or the conditions differ in dtype, shape or number of rows, or the weight is negative.
    """
    cost = host_cost(x_0, x_1)
    check_clouds(c_0, c_1)
    c_0, c_1 = np.asarray(c_0), np.asarray(c_1)
    labels = [not np.issubdtype(c.dtype, np.inexact) for c in (c_0, c_1)]
    if (len(c_0), len(c_1)) != cost.shape or labels[0] != labels[1]:
        raise UserError(
            f"conditions are {c_0.dtype}{list(c_0.shape)} and {c_1.dtype}{list(c_1.shape)} for {cost.shape[0]} and "
            f"{cost.shape[1]} rows, expected labels for both or vectors for both, one per row."
        )
    check_number("weight", weight)
    if not weight >= 0:
        raise UserError(f"weight is {weight:g}, expected a number of 0 or more.")
    if labels[0]:
        differ = flatten_rows(c_0)[:, None] != flatten_rows(c_1)[None]
        condition_cost = differ.any(axis=2).astype(cost.dtype)
    else:
        condition_cost = host_cost(c_0, c_1).astype(cost.dtype)
    return np.arange(len(x_0)), assign(cost + weight * cost.std() * condition_cost)


def sinkhorn(
    x_0: CheckedBatch,
    x_1: CheckedBatch,
    epsilon: Scalar = 0.05,
    key: RandomKey | None = None,
    *,
    rounding: str = "draw",
    relative: bool = True,
    tolerance: Scalar = 1e-3,
    max_iterations: int = 2_000,
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Returns pairs from the entropic optimal-transport plan of a batch, on the device (Tong et al. 2024, SB-CFM).

    Args:
      x_0, x_1: noise and data with the same number of rows; the computation is in float32 at least.
      epsilon: in standard deviations of the squared distances, or in their units if not `relative`.
      key: for `rounding="draw"`.
      rounding: "draw" uses each row of noise once and draws its partner from the plan, so the distribution of the noise
        is unchanged. "round" returns a permutation: the rows, in the order of their largest entry of the plan, are
        assigned the most probable partner that is left.
      relative: see epsilon.
      tolerance, max_iterations: the solver (entropic.py) stops at either.

    Returns:
      (i, j) with i = 0, 1, ... If the plan is not finite, as with NaN in the data, then j = i, so that every row is
      used and the loss is not finite either.

    Raises:
      UserError: epsilon is not above 0, the key is missing, `rounding` is unknown, or the shapes differ.
    """
    x_0, x_1 = same_rows(x_0=x_0, x_1=x_1)
    check_clouds(x_0, x_1)
    if not isinstance(rounding, str) or rounding not in ("draw", "round"):
        raise UserError(f'rounding={rounding!r} is unknown, expected "draw" or "round".')
    if key is None and rounding == "draw":
        raise UserError('couplings.sinkhorn draws partners: pass `key`, or rounding="round".')
    if key is not None:
        check_key("key", key)
    check_number("epsilon", epsilon)
    check_number("tolerance", tolerance, 0.0)
    check_whole("max_iterations", max_iterations)
    if not is_traced(epsilon) and not epsilon > 0:
        raise UserError(f"epsilon is {float(epsilon):g}, expected a number above 0; couplings.exact has no epsilon.")
    return _sinkhorn(x_0, x_1, epsilon, key, rounding, relative, tolerance, max_iterations)


@functools.partial(jax.jit, static_argnames=("rounding", "relative", "max_iterations"))
def _sinkhorn(x_0, x_1, epsilon, key, rounding, relative, tolerance, max_iterations):
    cost = entropic.squared_distances(x_0, x_1)
    scale = entropic.relative_epsilon(cost, epsilon) if relative else epsilon
    log_plan = entropic.solve(cost, scale, tolerance=tolerance, max_iterations=max_iterations).log_plan(cost)
    rows = jnp.arange(len(x_0))
    partners = greedy_permutation(log_plan) if rounding == "round" else jax.random.categorical(key, log_plan, axis=1)
    return rows, jnp.where(jnp.isfinite(log_plan).all(), partners, rows)


def greedy_permutation(score: Float[Array, "N M"]) -> Int[Array, " N"]:
    """Assigns each row a column of its own: rows, in the order of their best scores, get the best column that is left.

    Raises:
      UserError: the matrix is not square.
    """
    check_numbers("scores", score)
    score = jnp.asarray(score)
    n = len(score) if score.ndim else 0
    if score.shape != (n, n):
        raise UserError(f"scores have shape {list(score.shape)}, expected as many columns as rows.")
    score = jnp.maximum(score, jnp.finfo(score.dtype).min)  # above the -inf of columns that are assigned

    def assign_row(carry, row):
        free, columns = carry
        column = jnp.argmax(jnp.where(free, score[row], -jnp.inf))
        return (free.at[column].set(False), columns.at[row].set(column)), None

    order = jnp.argsort(-score.max(axis=1))
    (_, columns), _ = lax.scan(assign_row, (jnp.ones(n, bool), jnp.zeros(n, order.dtype)), order)
    return columns


def over_buffer(
    x_0: CheckedBatch, x_1: CheckedBatch, batch_size: int, seed: int, coupling: Callable = exact
) -> Iterator[HostPairs]:
    """Couples a buffer of several batches and yields its pairs in batches, in random order.

    A minibatch coupling approaches the true one slowly as the batch grows; with a buffer one larger problem is solved
    for several steps.

    Args:
      x_0, x_1: noise and data of the whole buffer.
      batch_size: pairs per batch, a divisor of the buffer's size.
      seed: for the order.
      coupling: (x_0, x_1) -> (i, j).

    Yields:
      (i, j), `batch_size` indices into the buffer each; every pair once.

    Raises:
      UserError: the examples of x_0 and x_1 differ in shape, the batch size is no divisor, or the coupling does not
        return a pair for each row.
    """
    check_clouds(x_0, x_1)
    check_whole("batch_size", batch_size, None)
    check_whole("seed", seed, 0)
    if batch_size < 1 or len(x_0) % batch_size:
        raise UserError(f"a buffer of {len(x_0)} rows cannot be divided into batches of {batch_size}.")
    i, j = (np.asarray(index) for index in call_now(coupling, x_0, x_1))
    check_pairs(i, j, len(x_0), len(x_1))
    if len(i) != len(x_0):
        raise UserError(f"a coupling returned {len(i)} pairs of {len(x_0)} rows, expected one for each row.")
    for rows in np.random.default_rng(seed).permutation(len(i)).reshape(-1, batch_size):
        yield i[rows], j[rows]


class Quality(NamedTuple):
    """Mean squared distances of pairs.

    Attributes:
      cost: of the given pairs.
      independent_cost: of all pairs, the expectation of the independent coupling.
      exact_cost: of the exact coupling.
      gain_share: 0 for the cost of the independent coupling, 1 for that of the exact one.
    """

    cost: Number
    independent_cost: Number
    exact_cost: Number
    gain_share: Number


def quality(x_0: CheckedBatch, x_1: CheckedBatch, i: Int[AnyArray, "..."], j: Int[AnyArray, "..."]) -> Quality:
    """Compares the cost of pairs with the costs of the independent and the exact coupling.

    Raises:
      UserError: as `exact`; or i and j are not row indices of one length.
    """
    cost = host_cost(x_0, x_1)
    for index in (i, j):
        check_numbers("indices", index)
    check_pairs(np.asarray(i), np.asarray(j), *cost.shape)
    exact_cost = float(cost[np.arange(len(cost)), assign(cost)].mean())
    mean, pairs_cost = float(cost.mean()), float(cost[np.asarray(i), np.asarray(j)].mean())
    gain_share = (mean - pairs_cost) / (mean - exact_cost) if mean > exact_cost else 1.0
    return Quality(pairs_cost, mean, exact_cost, gain_share)
