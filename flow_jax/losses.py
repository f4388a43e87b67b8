"""Losses of velocity models: flow matching (Lipman et al. 2023) and its conditional forms.

Every loss is an array [B]: for each row the squared error, averaged over the entries of the example. The caller
averages over rows, with weights or without. The gradients of `flow_matching` and `conditional_flow_matching` are equal
in expectation (Theorem 2), as the conditional targets scatter around the marginal one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Num

from flow_jax.argument_checks import check_key, check_number, check_numbers
from flow_jax.arrays import (
    CheckedBatch,
    CheckedTime,
    Labels,
    RandomKey,
    Scalar,
    as_rows,
    check_args,
    check_null,
    squared_error,
    velocity_at,
)
from flow_jax.callables import call_now
from flow_jax.couplings.pairings import check_pairs
from flow_jax.paths.affine import PathSample, checked, row_times
from train_jax.core.errors import UserError


def flow_matching(velocity: Callable, marginal: Callable, t: CheckedTime, x: CheckedBatch, *args) -> Float[Array, " B"]:
    """Returns |v(t, x) - u(t, x)|^2 for a known marginal field u.

    Args:
      velocity: (t, x, *args) -> [B, ...].
      marginal: (t, x) -> [B, ...], such as `MixtureMarginal.velocity`.
      t: [B].
      x: draws from the marginal path at t.
      *args: passed on to the velocity.

    Raises:
      UserError: the velocity or the marginal field does not have x's shape, or t is not one time for each row.
    """
    x = as_rows("x", x)
    t = row_times(t, x)
    return squared_error(velocity_at(velocity, t, x, *args), velocity_at(marginal, t, x))


def conditional_flow_matching(velocity: Callable, sample: PathSample, *args) -> Float[Array, " B"]:
    """Returns |v(t, x_t) - dx_t|^2 for samples of a path.

    Args:
      velocity: (t, x, *args) -> [B, ...].
      sample: of any path and any coupling.
      *args: passed on to the velocity, for example labels.

    Raises:
      UserError: the velocity does not have x_t's shape, or the shapes in the sample do not match.
    """
    sample = checked(sample)
    return squared_error(velocity_at(velocity, sample.t, sample.x_t, *args), sample.dx_t)


def coupled_flow_matching(
    velocity: Callable,
    path,
    x_0: CheckedBatch,
    x_1: CheckedBatch,
    t: CheckedTime,
    coupling: Callable,
    *args,
    key: RandomKey | None = None,
) -> Float[Array, " B"]:
    """Returns the conditional flow-matching loss of coupled pairs; with `couplings.sinkhorn` or `exact` it is OT-CFM's.

    Args:
      velocity: (t, x, *args) -> [B, ...].
      path: a path of flow_jax.paths.
      x_0: noise [B, ...].
      x_1: data [B, ...].
      t: one time for the batch, or [B].
      coupling: (x_0, x_1) -> (i, j). Inside `jax.jit` it must run on the device; call the others beforehand.
      *args: arrays with a row for each row of x_1, such as labels; they are reordered with it.
      key: for a path that adds noise.

    Raises:
      UserError: shapes do not match, or the coupling does not return two lists of row indices of one length.
    """
    x_0, x_1 = as_rows("x_0", x_0), as_rows("x_1", x_1)
    check_args(args, x_1)
    if not hasattr(path, "sample"):
        raise UserError(f"the path is {path!r}, expected one of flow_jax.paths: pass CondOT(), for example.")
    i, j = call_now(coupling, x_0, x_1)
    check_pairs(i, j, len(x_0), len(x_1))
    sample = path.sample(x_0[i], x_1[j], t, key=key)
    return conditional_flow_matching(velocity, sample, *jax.tree.map(lambda rows: jnp.asarray(rows)[j], args))


def drop_labels(
    labels: Labels, rate: Scalar, null: int | float | tuple[int, ...], keys: Key[Array, " K"] | Key[Array, ""]
) -> Num[Array, "B ..."]:
    """Replaces each row's label by `null` with probability `rate` (Ho and Salimans 2022).

    Dropping the labels of a whole batch at once has the same mean, but the steps alternate between two losses.

    Args:
      labels: [B]; or several labels or a vector for each row, which are replaced together.
      rate: 0 to 1.
      null: the label, or the labels of a row, that mean "no label", see models.layers.Condition.
      keys: one for each row, or one for all.

    Raises:
      UserError: the numbers of keys and rows differ, null does not have the shape or range of a row's label, or the
        rate is not from 0 to 1.
    """
    check_numbers("labels", labels)
    labels = jnp.asarray(labels)
    if not labels.ndim:
        raise UserError(f"labels are the number {labels}, expected one or more per row: pass an array [B] or [B, K].")
    check_number("rate", rate, 0.0, 1.0)
    check_key("keys", keys)
    shape = labels.shape[:1]
    if keys.ndim and keys.shape != shape:
        raise UserError(f"there are {keys.shape[0]} keys for {len(labels)} rows of labels, expected one key per row.")
    check_null(null, labels)
    draws = jax.random.uniform(keys, shape) if keys.ndim == 0 else jax.vmap(jax.random.uniform)(keys)
    dropped = (draws < rate).reshape(*shape, *(1,) * (labels.ndim - 1))
    return jnp.where(dropped, jnp.asarray(null, labels.dtype), labels)
