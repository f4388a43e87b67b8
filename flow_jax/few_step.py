"""Few-step sampling: MeanFlow (Geng et al. 2025) and reflow (Liu et al. 2023).

MeanFlow learns the mean velocity from t to a later time s along the flow, u(t, x, s) = (x_s - x_t) / (s - t), so that
one evaluation crosses the whole path. Differentiating (s - t) u = int_t^s v with respect to t along the flow, with time
running from noise to data, gives

  u = v + (s - t) du/dt,   du/dt = d_t u + v . d_x u.

The right side is the target; its derivative is one `jax.jvp` with tangent (1, v, 0).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from flow_jax.argument_checks import check_function, check_key, check_number, check_whole
from flow_jax.arrays import (
    BatchArray,
    CheckedBatch,
    CheckedTime,
    Number,
    RandomKey,
    Time,
    as_rows,
    check_args,
    per_row,
    squared_error,
    velocity_at,
)
from flow_jax.callables import run
from flow_jax.models.layers import batch_times, time_features
from flow_jax.ode.sampling import sample
from flow_jax.paths.affine import PathSample, checked, row_times
from flow_jax.times import Times
from train_jax.core.errors import UserError


def mean_flow(
    mean_velocity: Callable, sample: PathSample, end: CheckedTime, *args, power: Number = 0.0
) -> Float[Array, " B"]:
    """Returns MeanFlow's loss [B] for samples of a path.

    Args:
      mean_velocity: (t, x, s, *args) -> [B, ...], differentiable in t and x, such as a `MeanVelocity`.
      sample: `sample.t` is the start of the interval, and `sample.dx_t` serves as the velocity there.
      end: the end s >= t of the interval, [B]; where s = t the loss is that of conditional flow matching.
      *args: passed on to the mean velocity.
      power: a row's loss is weighted by 1 / (loss + 1e-3)^power, without a gradient through the weight (section 4.3 of
        the paper). 0 is the plain squared error.

    Raises:
      UserError: the mean velocity does not have x_t's shape, the shapes in the sample do not match, or `end` is not one
        time for each row.
    """
    check_number("power", power)
    sample = checked(sample)
    end = row_times(end, sample.x_t)

    def u(t, x):
        return velocity_at(mean_velocity, t, x, end, *args)

    value, slope = jax.jvp(u, (sample.t, sample.x_t), (jnp.ones_like(sample.t), sample.dx_t))
    target = lax.stop_gradient(sample.dx_t + per_row(end - sample.t, sample.x_t) * slope)
    loss = squared_error(value, target)
    return loss / lax.stop_gradient(loss + 1e-3) ** power


def draw_intervals(
    key: RandomKey, n: int, times: Times, same: Number = 0.75
) -> tuple[Float[Array, " {n}"], Float[Array, " {n}"]]:
    """Draws the start t and end s >= t of n intervals, for `mean_flow`.

    Args:
      key: for the draws.
      n: number of intervals.
      times: distribution from which both ends are drawn.
      same: share of the intervals, in the mean, with s = t; the paper's best value is 0.75.

    Returns:
      t [n] and s [n].

    Raises:
      UserError: `times` is no distribution, n is negative, or the share is outside [0, 1].
    """
    check_key("key", key)
    check_whole("n", n, 0)
    if not isinstance(times, Times):
        raise UserError(f"times are {times!r}, expected a distribution of flow_jax.times: pass Uniform(), for example.")
    check_number("same", same, 0.0, 1.0)
    first, second, third = jax.random.split(key, 3)
    a, b = times.draw(first, n), times.draw(second, n)
    t, s = jnp.minimum(a, b), jnp.maximum(a, b)
    equal = jax.random.uniform(third, (n,)) < same
    return jnp.where(equal, a, t), jnp.where(equal, a, s)


def sample_mean_flow(mean_velocity: Callable, x_0: CheckedBatch, num_steps: int = 1, *args) -> Float[Array, "B ..."]:
    """Samples in `num_steps` jumps x_s = x_t + (s - t) u(t, x_t, s), one evaluation each.

    Args:
      mean_velocity: (t, x, s, *args) -> [B, ...], with scalar t and s.
      x_0: noise [B, ...].
      num_steps: number of jumps of equal length from t = 0 to 1.
      *args: arrays [B, ...] that are passed to the mean velocity, such as labels.

    Returns:
      Samples [B, ...].

    Raises:
      UserError: `num_steps` is below 1, or the mean velocity does not have x's shape.
    """
    check_function("mean_velocity", mean_velocity)
    check_whole("num_steps", num_steps)
    x_0 = as_rows("x_0", x_0)
    check_args(args, x_0)
    times = jnp.linspace(0.0, 1.0, num_steps + 1)
    return run(_jumps, functools.partial(velocity_at, mean_velocity), (), x_0, args, times)


def _jumps(field, arrays, x_0, args, times):
    def jump(x, ends):
        t, s = ends
        return x + (s - t).astype(x.dtype) * field(arrays, t, x, s, *args).astype(x.dtype), None

    return lax.scan(jump, x_0, (times[:-1], times[1:]))[0]


class MeanVelocity(nnx.Module):
    """A mean velocity (t, x, s) made from a model conditioned on vectors, which here are features of s - t.

    Args:
      model: (t, x, vectors [B, E]) -> [B, ...], a model of `fj.models` whose `vector_width` is E.
      width: E.
      time_scale: factor applied to all times that the model is given. The fastest of its time features has a period of
        about a hundredth, which the time derivative in MeanFlow's target would magnify; 0.01 makes it about one.
    """

    def __init__(self, model: nnx.Module, width: int, time_scale: Number = 0.01):
        check_function("model", model)
        check_whole("width", width)
        check_number("time_scale", time_scale)
        self.model, self.width, self.time_scale = model, width, time_scale

    def __call__(self, t: Time, x: BatchArray, s: Time) -> Float[Array, "B ..."]:
        """Returns the mean velocity from t to s."""
        gap = batch_times(s, x) - batch_times(t, x)
        return self.model(self.time_scale * t, x, time_features(self.time_scale * gap, self.width))


class Pairs(NamedTuple):
    """Noise and the samples that a flow maps it to: training pairs for the next model, `path.sample(*pairs, t)`."""

    x_0: Float[Array, "B ..."]
    x_1: Float[Array, "B ..."]


def reflow_pairs(velocity: Callable, x_0: CheckedBatch, **options) -> Pairs:
    """Returns the pairs on which reflow trains the next model, in place of independent ones, for straighter paths.

    Args:
      velocity: a trained velocity.
      x_0: noise.
      **options: passed to `sample`.

    Raises:
      UserError: as `sample`.
    """
    x_0 = as_rows("x_0", x_0)
    return Pairs(x_0, sample(velocity, x_0, **options).x)
