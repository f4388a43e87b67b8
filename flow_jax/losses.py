"""Losses of velocity models: flow matching (Lipman et al. 2023) and its conditional forms.

Every loss is one number a row, the mean over an example's entries of the squared error; the caller takes means or
weighted means over rows. Gradients of `flow_matching` and `conditional_flow_matching` agree in expectation (Theorem 2):
the targets of the second scatter around that of the first.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Num

from flow_jax.arrays import AnyArray, Labels, RandomKey, Rows, Scalar, mean_rows
from flow_jax.paths.affine import PathSample


def flow_matching(
    velocity: Callable, marginal: Callable, t: Float[AnyArray, " B"], x: Rows, *args
) -> Float[Array, " B"]:
    """|v(t, x) - u(t, x)|^2 against a marginal field that is known.

    Args:
      velocity: (t, x, *args) -> [B, ...].
      marginal: (t, x) -> [B, ...], such as `MixtureMarginal.velocity`.
      t: [B].
      x: draws from the marginal path at t.
      *args: passed on to the velocity.
    """
    return mean_rows((velocity(t, x, *args) - marginal(t, x)) ** 2)


def conditional_flow_matching(velocity: Callable, sample: PathSample, *args) -> Float[Array, " B"]:
    """|v(t, x_t) - dx_t|^2 at a path's sample.

    Args:
      velocity: (t, x, *args) -> [B, ...].
      sample: of any path and any coupling.
      *args: passed on to the velocity, labels say.
    """
    return mean_rows((velocity(sample.t, sample.x_t, *args) - sample.dx_t) ** 2)


def coupled_flow_matching(
    velocity: Callable,
    path,
    x_0: Rows,
    x_1: Rows,
    t: Float[AnyArray, " B"],
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
    """
    i, j = coupling(x_0, x_1)
    sample = path.sample(jnp.asarray(x_0)[i], jnp.asarray(x_1)[j], t, key=key)
    return conditional_flow_matching(velocity, sample, *jax.tree.map(lambda rows: jnp.asarray(rows)[j], args))


def drop_labels(
    labels: Labels, rate: Scalar, null: int | float | tuple[int, ...], keys: Key[Array, " B"] | Key[Array, ""]
) -> Num[Array, "B ..."]:
    """Labels of which each is replaced by `null` with probability `rate`, row by row (Ho and Salimans 2022).

    Dropping a whole batch at once has the same mean, but its steps alternate between two losses.

    Args:
      labels: of the rows, [B]; or several labels or a vector a row, which are replaced together.
      rate: 0 to 1.
      null: the label, or labels of a row, that stand for none, see models.features.Condition.
      keys: one a row, or one for all.
    """
    labels = jnp.asarray(labels)
    shape = labels.shape[:1]
    draws = jax.random.uniform(keys, shape) if keys.ndim == 0 else jax.vmap(jax.random.uniform)(keys)
    dropped = (draws < rate).reshape(*shape, *(1,) * (labels.ndim - 1))
    return jnp.where(dropped, jnp.asarray(null, labels.dtype), labels)
