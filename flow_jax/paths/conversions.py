"""Conversions between velocity, data, noise and score along an affine path; and a change of schedule after training.

In x = a x_1 + s e and v = a' x_1 + s' e (a is `alpha`, s is `sigma`, e is the noise x_0), any two of x, v, x_1 and e
determine the others. With the determinant w = a' s - a s',

  x_1 = (s v - s' x) / w        e = (a' x - a v) / w        score = -e / s

Near the ends of the path, quotients of small numbers lose all digits in float32 (sigma of VP and its infinite
derivative at t = 1, alpha at t = 0). Each path therefore gives the quotients that stay finite in closed form
(`Inverse`), and a difference such as x - a x_1 is computed as (x - x_1) + (1 - a) x_1, which is accurate where a is
close to 1.
"""

import abc
import functools
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from flow_jax.argument_checks import check_function
from flow_jax.arrays import CheckedBatch, CheckedTime, as_time, per_row, same_rows, velocity_at
from train_jax.core.errors import UserError


class Inverse(NamedTuple):
    """The coefficients that solve for x_1, noise and score: scalars or [B], each finite wherever its limit is.

    Attributes:
      x1_v, x1_x: x_1 = x1_v v + x1_x x.
      noise_v, noise_x: e = noise_v v + noise_x x.
      score_v, score_x: score = score_v v + score_x x.
    """

    x1_v: Array
    x1_x: Array
    noise_v: Array
    noise_x: Array
    score_v: Array
    score_x: Array


class Convertible(abc.ABC):
    """The conversions of an affine path, whose schedule a subclass defines.

    Every method takes arrays [B, ...] and one time for the batch or one for each row. Where a quantity is not
    determined (x_1 from the noise at alpha = 0, for example) the result is infinite or NaN, not a finite number that
    looks right. Shapes that do not match raise UserError.
    """

    time_range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    """The times at which the target is finite, for training."""

    @abc.abstractmethod
    def alpha(self, t) -> Array:
        """Returns the coefficient alpha of the data, for times of any shape."""

    @abc.abstractmethod
    def sigma(self, t) -> Array:
        """Returns the coefficient sigma of the noise."""

    @abc.abstractmethod
    def d_alpha(self, t) -> Array:
        """Returns alpha'(t)."""

    @abc.abstractmethod
    def d_sigma(self, t) -> Array:
        """Returns sigma'(t)."""

    def sigma_d_sigma(self, t) -> Array:
        """Returns sigma(t) sigma'(t), which stays finite where sigma' alone does not."""
        return self.sigma(t) * self.d_sigma(t)

    @abc.abstractmethod
    def one_minus_alpha(self, t) -> Array:
        """Returns 1 - alpha(t) without cancellation."""

    @abc.abstractmethod
    def one_minus_sigma(self, t) -> Array:
        """Returns 1 - sigma(t) without cancellation."""

    @abc.abstractmethod
    def time_at(self, alpha, sigma) -> Array:
        """Returns the time in [0, 1] at which alpha(t) / sigma(t) equals the ratio of the arguments."""

    @abc.abstractmethod
    def inverse(self, t) -> Inverse:
        """Returns the coefficients that solve for x_1, noise and score."""

    def velocity_to_x1(self, v: CheckedBatch, x_t: CheckedBatch, t: CheckedTime) -> Float[Array, "B ..."]:
        """Returns the data for a velocity: E[x_1 | x_t] for a marginal velocity."""
        v, x_t = same_rows(v=v, x_t=x_t)
        c = self.inverse(as_time(t, x_t))
        return per_row(c.x1_v, x_t) * v + per_row(c.x1_x, x_t) * x_t

    def velocity_to_epsilon(self, v: CheckedBatch, x_t: CheckedBatch, t: CheckedTime) -> Float[Array, "B ..."]:
        """Returns the noise for a velocity: E[x_0 | x_t] for a marginal velocity."""
        v, x_t = same_rows(v=v, x_t=x_t)
        c = self.inverse(as_time(t, x_t))
        return per_row(c.noise_v, x_t) * v + per_row(c.noise_x, x_t) * x_t

    def velocity_to_score(self, v: CheckedBatch, x_t: CheckedBatch, t: CheckedTime) -> Float[Array, "B ..."]:
        """Returns grad log p_t(x_t) for the marginal velocity; x_0 must be standard normal and independent of x_1."""
        v, x_t = same_rows(v=v, x_t=x_t)
        c = self.inverse(as_time(t, x_t))
        return per_row(c.score_v, x_t) * v + per_row(c.score_x, x_t) * x_t

    def x1_to_epsilon(self, x_1: CheckedBatch, x_t: CheckedBatch, t: CheckedTime) -> Float[Array, "B ..."]:
        """Returns the noise for a prediction of the data."""
        x_1, x_t = same_rows(x_1=x_1, x_t=x_t)
        t = as_time(t, x_t)
        return ((x_t - x_1) + per_row(self.one_minus_alpha(t), x_t) * x_1) / per_row(self.sigma(t), x_t)

    def x1_to_velocity(self, x_1: CheckedBatch, x_t: CheckedBatch, t: CheckedTime) -> Float[Array, "B ..."]:
        """Returns the velocity for a prediction of the data (for one x_1, the field of Lipman et al., Theorem 3)."""
        x_1, x_t = same_rows(x_1=x_1, x_t=x_t)
        t = as_time(t, x_t)
        noise = self.x1_to_epsilon(x_1, x_t, t)
        return per_row(self.d_alpha(t), x_t) * x_1 + per_row(self.d_sigma(t), x_t) * noise

    def x1_to_score(self, x_1: CheckedBatch, x_t: CheckedBatch, t: CheckedTime) -> Float[Array, "B ..."]:
        """Returns the score for a prediction of the data."""
        return self.epsilon_to_score(self.x1_to_epsilon(x_1, x_t, t), x_t, t)

    def epsilon_to_x1(self, epsilon: CheckedBatch, x_t: CheckedBatch, t: CheckedTime) -> Float[Array, "B ..."]:
        """Returns the data for a prediction of the noise."""
        epsilon, x_t = same_rows(epsilon=epsilon, x_t=x_t)
        t = as_time(t, x_t)
        return ((x_t - epsilon) + per_row(self.one_minus_sigma(t), x_t) * epsilon) / per_row(self.alpha(t), x_t)

    def epsilon_to_velocity(self, epsilon: CheckedBatch, x_t: CheckedBatch, t: CheckedTime) -> Float[Array, "B ..."]:
        """Returns the velocity for a prediction of the noise."""
        epsilon, x_t = same_rows(epsilon=epsilon, x_t=x_t)
        t = as_time(t, x_t)
        x_1 = self.epsilon_to_x1(epsilon, x_t, t)
        return per_row(self.d_alpha(t), x_t) * x_1 + per_row(self.d_sigma(t), x_t) * epsilon

    def epsilon_to_score(self, epsilon: CheckedBatch, x_t: CheckedBatch, t: CheckedTime) -> Float[Array, "B ..."]:
        """Returns the score for E[x_0 | x_t]."""
        epsilon, x_t = same_rows(epsilon=epsilon, x_t=x_t)
        return -epsilon / per_row(self.sigma(as_time(t, x_t)), x_t)

    def score_to_velocity(self, score: CheckedBatch, x_t: CheckedBatch, t: CheckedTime) -> Float[Array, "B ..."]:
        """Returns the velocity a' / a x_t + (a' s^2 / a - s s') score for a score; finite where s = 0."""
        score, x_t = same_rows(score=score, x_t=x_t)
        t = as_time(t, x_t)
        a, s = self.alpha(t), self.sigma(t)
        rate = self.d_alpha(t) / a
        return per_row(rate, x_t) * x_t + per_row(rate * s * s - self.sigma_d_sigma(t), x_t) * score


def change_schedule(velocity: Callable, old: Convertible, new: Convertible) -> Callable:
    """Converts a velocity trained along `old` to the path `new`, which has the same data and noise at other times.

    Args:
      velocity: function (t, x, ...) -> velocity of x [B, ...]. It is evaluated at the time in [0, 1] where `old` has
        the signal-to-noise ratio that `new` has at t.
      old, new: affine paths.

    Returns:
      A function (t, x, ...) for `sample` and `log_prob`. Ratios below those of `old` (alpha of VP is 0.007 at t = 0)
      are evaluated at t = 0. Where the velocity of `new` is infinite, as that of VP at t = 1, the nearest time of
      `new.time_range` is used.
    """
    check_function("velocity", velocity)
    for path in (old, new):
        if not isinstance(path, Convertible):
            raise UserError(
                f"the path is {path!r}, expected an affine path: pass flow_jax.paths.CondOT(), for example."
            )
    return functools.partial(_changed, velocity, old, new)  # a partial, as `callables.run` keeps its weights current


def _changed(velocity, old: Convertible, new: Convertible, t, x, *args):
    t = jnp.clip(as_time(t, x), *new.time_range)
    alpha, sigma = new.alpha(t), new.sigma(t)
    old_t = old.time_at(alpha, sigma)
    scale = per_row((alpha + sigma) / (old.alpha(old_t) + old.sigma(old_t)), x)
    old_x = (x / scale).astype(x.dtype)
    v = velocity_at(velocity, old_t, old_x, *args)
    x_1, noise = old.velocity_to_x1(v, old_x, old_t), old.velocity_to_epsilon(v, old_x, old_t)
    return per_row(new.d_alpha(t), x) * x_1 + per_row(new.d_sigma(t), x) * noise
