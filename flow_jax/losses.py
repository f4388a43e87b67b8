"""Losses of velocity models: flow matching (Lipman et al. 2023) and its conditional forms.

Every loss is one number a row, the mean over an example's entries of the squared error; the caller takes means or
weighted means over rows. Gradients of `flow_matching` and `conditional_flow_matching` agree in expectation (Theorem 2):
the targets of the second scatter around that of the first.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Num

from flow_jax.argument_checks import check_key, check_number, check_numbers
from flow_jax.arrays import (
    CheckedRows,
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


def flow_matching(velocity: Callable, marginal: Callable, t: CheckedTime, x: CheckedRows, *args) -> Float[Array, " B"]:
    """|v(t, x) - u(t, x)|^2 against a marginal field that is known.

    Args:
      velocity: (t, x, *args) -> [B, ...].
      marginal: (t, x) -> [B, ...], such as `MixtureMarginal.velocity`.
      t: [B].
      x: draws from the marginal path at t.
      *args: passed on to the velocity.

    Raises:
      UserError: a velocity or a marginal field that is not of x's shape, or times that are not one a row.
    """
    x = as_rows("x", x)
    t = row_times(t, x)
    return squared_error(velocity_at(velocity, t, x, *args), velocity_at(marginal, t, x))


def conditional_flow_matching(velocity: Callable, sample: PathSample, *args) -> Float[Array, " B"]:
    """|v(t, x_t) - dx_t|^2 at a path's sample.

    Args:
      velocity: (t, x, *args) -> [B, ...].
      sample: of any path and any coupling.
      *args: passed on to the velocity, labels say.

    Raises:
      UserError: a velocity that is not of x_t's shape, or a sample whose arrays do not fit.
    """
    sample = checked(sample)
    return squared_error(velocity_at(velocity, sample.t, sample.x_t, *args), sample.dx_t)


def coupled_flow_matching(
    velocity: Callable,
    path,
    x_0: CheckedRows,
    x_1: CheckedRows,
    t: CheckedTime,
    coupling: Callable,
    *args,
    key: RandomKey | None = None,
) -> Float[Array, " B"]:
    """Conditional flow matching on coupled pairs: with `couplings.sinkhorn` or `exact` it is OT-CFM's loss.

    Args:
      velocity, x_0, x_1, t: as above.
      path: a path of paths.py.
      coupling: (x_0, x_1) -> (i, j); inside `jax.jit` one that runs on the device, the others before it.
      *args: arrays of rows that belong to x_1, labels say; they go along with it.
      key: of a path with noise of its own.

    Raises:
      UserError: rows of other shapes or numbers, or a coupling that does not return indices of them, as many of each.
    """
    x_0, x_1 = as_rows("x_0", x_0), as_rows("x_1", x_1)
    check_args(args, x_1)
    if not hasattr(path, "sample"):
        raise UserError(f"the path is {path!r}, expected one of flow_jax.paths: pass CondOT(), say.")
    i, j = call_now(coupling, x_0, x_1)
    check_pairs(i, j, len(x_0), len(x_1))
    sample = path.sample(x_0[i], x_1[j], t, key=key)
    return conditional_flow_matching(velocity, sample, *jax.tree.map(lambda rows: jnp.asarray(rows)[j], args))


def drop_labels(
    labels: Labels, rate: Scalar, null: int | float | tuple[int, ...], keys: Key[Array, " K"] | Key[Array, ""]
) -> Num[Array, "B ..."]:
    """Labels of which each is replaced by `null` with probability `rate`, row by row (Ho and Salimans 2022).

    Dropping a whole batch at once has the same mean, but its steps alternate between two losses.

    Args:
      labels: of the rows, [B]; or several labels or a vector a row, which are replaced together.
      rate: 0 to 1.
      null: the label, or labels of a row, that stand for none, see models.layers.Condition.
      keys: one a row, or one for all.

    Raises:
      UserError: another number of keys than of rows, a null that is not a row's or that their dtype does not
        hold, or a rate that is not from 0 to 1.
    """
    check_numbers("labels", labels)
    labels = jnp.asarray(labels)
    if not labels.ndim:
        raise UserError(f"labels are the number {labels}, expected one or more a row: give an array [B] or [B, K].")
    check_number("rate", rate, 0.0, 1.0)
    check_key("keys", keys)
    shape = labels.shape[:1]
    if keys.ndim and keys.shape != shape:
        raise UserError(f"{keys.shape[0]} keys stand beside {len(labels)} rows of labels, expected one key a row.")
    check_null(null, labels)
    draws = jax.random.uniform(keys, shape) if keys.ndim == 0 else jax.vmap(jax.random.uniform)(keys)
    dropped = (draws < rate).reshape(*shape, *(1,) * (labels.ndim - 1))
    return jnp.where(dropped, jnp.asarray(null, labels.dtype), labels)
