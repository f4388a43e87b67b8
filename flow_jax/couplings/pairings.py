"""Couplings: which row of noise goes with which row of data in a batch. Any coupling goes with any path.

Every function returns index pairs (i, j): x_0[i[k]] is paired with x_1[j[k]], and labels of the data go along as
y_1[j]. An *exact* coupling is a permutation: drawing pairs from the optimal plan with replacement, as is common, is
equal in expectation but keeps only 1 - 1/e of a batch's rows. `exact`, `conditional` and `within_class` run on the
host, made for the input pipeline, off the device's critical path; `sinkhorn` is jitted and may be part of a step.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from flow_jax.argument_checks import check_key, check_number, check_numbers, check_whole
from flow_jax.arrays import AnyArray, CheckedRows, Number, RandomKey, Scalar, check_clouds, flatten_rows, same_rows
from flow_jax.callables import call_now
from flow_jax.couplings import entropic
from flow_jax.couplings.assignment import assign
from train_jax.core.errors import UserError

HostPairs = tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]
Conditions = Int[AnyArray, "..."] | Float[AnyArray, "..."]


def host_cost(x_0: CheckedRows, x_1: CheckedRows) -> Float[np.ndarray, "N M"]:
    """|x_0 - x_1|^2 over all axes of an example [N, ...], [M, ...], on the host, in float32 at least.

    Raises:
      UserError: no rows, or rows of two shapes.
    """
    check_clouds(x_0, x_1)
    x, y = (flatten_rows(np.asarray(rows)) for rows in (x_0, x_1))
    x, y = (rows.astype(np.result_type(rows.dtype, np.float32), copy=False) for rows in (x, y))
    centre = y.mean(axis=0, keepdims=True)  # small numbers cancel less
    x, y = x - centre, y - centre
    cost = (-2 * x) @ y.T
    cost += (x**2).sum(axis=1)[:, None]
    cost += (y**2).sum(axis=1)[None]
    return np.maximum(cost, 0, out=cost)


def check_pairs(i, j, n: int, m: int) -> None:
    """Raises UserError unless i and j are indices of n and of m rows, as many of each; JAX would clip them."""
    for name, index, rows in (("i", i, n), ("j", j, m)):
        if jnp.ndim(index) != 1 or not jnp.issubdtype(index.dtype, jnp.integer) or index.shape != i.shape:
            raise UserError(
                f"a coupling returned {i.dtype}{list(i.shape)} and {j.dtype}{list(j.shape)}, expected two lists of "
                "indices of one length."
            )
        if not isinstance(index, jax.core.Tracer) and index.size and not (index.min() >= 0 and index.max() < rows):
            raise UserError(f"a coupling's {name} has values from {index.min()} to {index.max()} for {rows} rows.")


def exact(x_0: CheckedRows, x_1: CheckedRows) -> HostPairs:
    """The permutation of least total squared distance (OT-CFM's coupling, Tong et al. 2024; Pooladian et al. 2023).

    Args:
      x_0, x_1: noise and data of one size, any shape of rows.

    Returns:
      i = 0, 1, ... and the permutation j.

    Raises:
      UserError: sizes or shapes differ, or entries are not finite.
    """
    columns = assign(host_cost(x_0, x_1))
    return np.arange(len(columns)), columns


def independent(n: int, key: RandomKey) -> tuple[Int[Array, " {n}"], Int[Array, " {n}"]]:
    """Pairs at random: each row once."""
    check_whole("n", n, 0)
    check_key("key", key)
    return jnp.arange(n), jax.random.permutation(key, n)


def within_class(
    x_0: CheckedRows, x_1: CheckedRows, y_0: Int[AnyArray, "..."], y_1: Int[AnyArray, "..."]
) -> HostPairs:  # fmt: skip
    """The cheapest permutation that pairs rows of equal labels alone.

    A coupling that ignores labels ties a class to a part of the noise; sampling that class from all of the noise
    then starts where training never was (torchcfm's issue 117). Within a class the noise stays what it is.

    Args:
      x_0, x_1: noise and data.
      y_0, y_1: labels; noise has none of its own, so give it the data's, in any order.

    Raises:
      UserError: a label has not as many rows on both sides, there are more labels than rows or fewer, or several a row.
    """
    for labels in (y_0, y_1):
        check_numbers("labels", labels)
    check_clouds(x_0, x_1)
    y_0, y_1 = np.asarray(y_0), np.asarray(y_1)
    x_0, x_1 = np.asarray(x_0), np.asarray(x_1)
    if y_0.ndim != 1 or y_1.ndim != 1:
        raise UserError(
            f"labels have shapes {list(y_0.shape)} and {list(y_1.shape)}, expected one a row: else use conditional."
        )
    if len({len(x_0), len(x_1), len(y_0), len(y_1)}) > 1:
        raise UserError(
            f"{len(x_0)} rows of noise with {len(y_0)} labels and {len(x_1)} of data with {len(y_1)}, expected one "
            "number: give each row its label."
        )
    columns = np.empty(len(x_0), np.int64)
    for label in np.union1d(y_0, y_1):
        rows, targets = np.flatnonzero(y_0 == label), np.flatnonzero(y_1 == label)
        if len(rows) != len(targets):
            raise UserError(
                f"label {label} has {len(rows)} rows of noise and {len(targets)} of data, expected equal numbers: "
                "give the noise the labels of the data."
            )
        columns[rows] = targets[assign(host_cost(x_0[rows], x_1[targets]))]
    return np.arange(len(x_0)), columns


def conditional(
    x_0: CheckedRows, x_1: CheckedRows, c_0: Conditions, c_1: Conditions, weight: Number = 1.0
) -> HostPairs:
    """The permutation of least squared distance plus a price for unequal conditions (C2OT, Cheng and Schwing 2025).

    Args:
      x_0, x_1: noise and data.
      c_0, c_1: conditions. Integers [B], or several a row [B, K], cost 1 where any differs; float vectors [B, ...]
        their squared distance. Give the noise those of the data, in any order.
      weight: of the condition term, in standard deviations of the distance term; 0 is `exact`, a large one
        `within_class` where conditions are labels.

    Raises:
      UserError: as `exact`; conditions of two kinds or shapes, or of other numbers of rows; a negative weight.
    """
    cost = host_cost(x_0, x_1)
    check_clouds(c_0, c_1)
    c_0, c_1 = np.asarray(c_0), np.asarray(c_1)
    labels = [not np.issubdtype(c.dtype, np.inexact) for c in (c_0, c_1)]
    if (len(c_0), len(c_1)) != cost.shape or labels[0] != labels[1]:
        raise UserError(
            f"conditions are {c_0.dtype}{list(c_0.shape)} and {c_1.dtype}{list(c_1.shape)} of {cost.shape[0]} and "
            f"{cost.shape[1]} rows, expected labels or vectors of both, one a row."
        )
    check_number("weight", weight)
    if not weight >= 0:
        raise UserError(f"weight is {weight:g}, expected a number of 0 or more.")
    if labels[0]:
        differ = flatten_rows(c_0)[:, None] != flatten_rows(c_1)[None]
        price = differ.any(axis=2).astype(cost.dtype)
    else:
        price = host_cost(c_0, c_1).astype(cost.dtype)
    return np.arange(len(x_0)), assign(cost + weight * cost.std() * price)


def sinkhorn(
    x_0: CheckedRows,
    x_1: CheckedRows,
    epsilon: Scalar = 0.05,
    key: RandomKey | None = None,
    *,
    rounding: str = "draw",
    relative: bool = True,
    tolerance: Scalar = 1e-3,
    max_iterations: int = 2_000,
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Pairs from the entropic plan, on the device.

    Args:
      x_0, x_1: noise and data, as many rows of each; computed in float32 at least.
      epsilon: in standard deviations of the squared distances; absolute if not `relative`.
      key: for `rounding="draw"`.
      rounding: "draw" takes each row of noise once and draws its partner from the row's distribution, so the noise
        keeps its law exactly; "round" is a permutation: rows take, the surest first, the likeliest partner left.
      relative: see epsilon.
      tolerance, max_iterations: of the solver (entropic.py), which stops there whether it has converged or not.

    Returns:
      (i, j) with i = 0, 1, ... Where the plan is not finite, as with a NaN among the rows, j is i: every row is used,
      and the loss of the step tells of the fault.

    Raises:
      UserError: an epsilon that is not above 0, drawing without a key, another rounding, or arrays of two shapes.
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
    if not isinstance(epsilon, jax.core.Tracer) and not epsilon > 0:
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
    """A column for each row, none twice: rows in the order of their best score take the best column left.

    Raises:
      UserError: a matrix that is not square.
    """
    check_numbers("scores", score)
    score = jnp.asarray(score)
    n = len(score) if score.ndim else 0
    if score.shape != (n, n):
        raise UserError(f"scores have shape {list(score.shape)}, expected as many columns as rows.")
    score = jnp.maximum(score, jnp.finfo(score.dtype).min)  # any column left is better than one taken

    def take(carry, row):
        free, columns = carry
        column = jnp.argmax(jnp.where(free, score[row], -jnp.inf))
        return (free.at[column].set(False), columns.at[row].set(column)), None

    order = jnp.argsort(-score.max(axis=1))
    (_, columns), _ = lax.scan(take, (jnp.ones(n, bool), jnp.zeros(n, order.dtype)), order)
    return columns


def over_buffer(
    x_0: CheckedRows, x_1: CheckedRows, batch_size: int, seed: int, coupling: Callable = exact
) -> Iterator[HostPairs]:
    """Couples a buffer larger than the batch, then deals its pairs in random order.

    Minibatch couplings approach the true one slowly as the batch grows; a buffer of several batches costs one larger
    problem in as many steps.

    Args:
      x_0, x_1: noise and data of the whole buffer.
      batch_size: of the batches to deal; divides the buffer.
      seed: of the order.
      coupling: (x_0, x_1) -> (i, j).

    Yields:
      (i, j) into the buffer, `batch_size` pairs each, every pair once.

    Raises:
      UserError: clouds of two shapes, a batch that does not divide them, or a coupling that does not return a pair for
        each row.
    """
    check_clouds(x_0, x_1)
    check_whole("batch_size", batch_size, None)
    check_whole("seed", seed, 0)
    if batch_size < 1 or len(x_0) % batch_size:
        raise UserError(f"a buffer of {len(x_0)} rows does not divide into batches of {batch_size}.")
    i, j = (np.asarray(index) for index in call_now(coupling, x_0, x_1))
    check_pairs(i, j, len(x_0), len(x_1))
    if len(i) != len(x_0):
        raise UserError(f"a coupling returned {len(i)} pairs of {len(x_0)} rows, expected one for each row.")
    for rows in np.random.default_rng(seed).permutation(len(i)).reshape(-1, batch_size):
        yield i[rows], j[rows]


class Quality(NamedTuple):
    """Mean squared distances of pairs; `gain_share` is 0 for the independent coupling, 1 for the exact one."""

    cost: Number
    independent_cost: Number
    exact_cost: Number
    gain_share: Number


def quality(x_0: CheckedRows, x_1: CheckedRows, i: Int[AnyArray, "..."], j: Int[AnyArray, "..."]) -> Quality:
    """How much of what an exact coupling saves these pairs save; a solver's "converged" does not tell.

    Raises:
      UserError: as `exact`; or i and j that are not indices of the rows, as many of each.
    """
    cost = host_cost(x_0, x_1)
    for index in (i, j):
        check_numbers("indices", index)
    check_pairs(np.asarray(i), np.asarray(j), *cost.shape)
    best = float(cost[np.arange(len(cost)), assign(cost)].mean())
    mean, got = float(cost.mean()), float(cost[np.asarray(i), np.asarray(j)].mean())
    return Quality(got, mean, best, (mean - got) / (mean - best) if mean > best else 1.0)
