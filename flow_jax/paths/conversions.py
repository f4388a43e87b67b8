"""What a model may predict along an affine path, turned into one another; and a change of schedule after training.

Of a path x = a x_1 + s e (a `alpha`, s `sigma`, e the noise x_0) and v = a' x_1 + s' e, any two quantities give the
others. With the determinant w = a' s - a s',

  x_1 = (s v - s' x) / w        e = (a' x - a v) / w        score = -e / s

Near the ends, quotients of vanishing numbers lose all digits in float32 (sigma of VP and its infinite derivative at
t = 1, alpha at t = 0). So a path gives the quotients that stay finite in closed form (`Inverse`), and differences such
as x - a x_1 are taken as (x - x_1) + (1 - a) x_1, exact where a is close to 1.
"""

import abc
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from flow_jax.argument_checks import check_function
from flow_jax.arrays import CheckedRows, CheckedTime, as_time, per_row, same_rows, velocity_at
from train_jax.core.errors import UserError


class Inverse(NamedTuple):
    """The coefficients that solve for x_1 and the noise; scalars or [B], each finite wherever its limit is.

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
    """An affine path's conversions; the coefficients are the subclass's.

    Every method takes arrays [B, ...] and times, one for all rows or one a row. Where a quantity is not determined
    (x_1 from the noise at alpha = 0, say) the result is infinite or NaN, not a bounded number that looks right. Arrays
    of two shapes, or times that do not fit, raise UserError.
    """

    @abc.abstractmethod
    def alpha(self, t): ...

    @abc.abstractmethod
    def sigma(self, t): ...

    @abc.abstractmethod
    def d_alpha(self, t): ...

    @abc.abstractmethod
    def d_sigma(self, t): ...

    def sigma_d_sigma(self, t):
        """sigma(t) sigma'(t), which stays finite where sigma' alone does not."""
        return self.sigma(t) * self.d_sigma(t)

    @abc.abstractmethod
    def one_minus_alpha(self, t):
        """1 - alpha(t) without cancellation."""

    @abc.abstractmethod
    def one_minus_sigma(self, t):
        """1 - sigma(t) without cancellation."""

    @abc.abstractmethod
    def inverse(self, t) -> Inverse:
        """The coefficients that solve for x_1, noise and score."""

    def velocity_to_x1(self, v: CheckedRows, x_t: CheckedRows, t: CheckedTime) -> Float[Array, "B ..."]:
        """The data that (x_t, v) point to: E[x_1 | x_t] of a marginal velocity."""
        v, x_t = same_rows(v=v, x_t=x_t)
        c = self.inverse(as_time(t, x_t))
        return per_row(c.x1_v, x_t) * v + per_row(c.x1_x, x_t) * x_t

    def velocity_to_epsilon(self, v: CheckedRows, x_t: CheckedRows, t: CheckedTime) -> Float[Array, "B ..."]:
        """The noise in x_t: E[x_0 | x_t] of a marginal velocity."""
        v, x_t = same_rows(v=v, x_t=x_t)
        c = self.inverse(as_time(t, x_t))
        return per_row(c.noise_v, x_t) * v + per_row(c.noise_x, x_t) * x_t

    def velocity_to_score(self, v: CheckedRows, x_t: CheckedRows, t: CheckedTime) -> Float[Array, "B ..."]:
        """The gradient of log p_t at x_t, given the marginal velocity; x_0 must be standard normal, free of x_1."""
        v, x_t = same_rows(v=v, x_t=x_t)
        c = self.inverse(as_time(t, x_t))
        return per_row(c.score_v, x_t) * v + per_row(c.score_x, x_t) * x_t

    def x1_to_epsilon(self, x_1: CheckedRows, x_t: CheckedRows, t: CheckedTime) -> Float[Array, "B ..."]:
        """The noise, given a prediction of the data."""
        x_1, x_t = same_rows(x_1=x_1, x_t=x_t)
        t = as_time(t, x_t)
        return ((x_t - x_1) + per_row(self.one_minus_alpha(t), x_t) * x_1) / per_row(self.sigma(t), x_t)

    def x1_to_velocity(self, x_1: CheckedRows, x_t: CheckedRows, t: CheckedTime) -> Float[Array, "B ..."]:
        """The velocity, given a prediction of the data (of one x_1 it is the field of Lipman et al., Theorem 3)."""
        x_1, x_t = same_rows(x_1=x_1, x_t=x_t)
        t = as_time(t, x_t)
        noise = self.x1_to_epsilon(x_1, x_t, t)
        return per_row(self.d_alpha(t), x_t) * x_1 + per_row(self.d_sigma(t), x_t) * noise

    def x1_to_score(self, x_1: CheckedRows, x_t: CheckedRows, t: CheckedTime) -> Float[Array, "B ..."]:
        """The score, given E[x_1 | x_t]."""
        return self.epsilon_to_score(self.x1_to_epsilon(x_1, x_t, t), x_t, t)

    def epsilon_to_x1(self, epsilon: CheckedRows, x_t: CheckedRows, t: CheckedTime) -> Float[Array, "B ..."]:
        """The data, given a prediction of the noise."""
        epsilon, x_t = same_rows(epsilon=epsilon, x_t=x_t)
        t = as_time(t, x_t)
        return ((x_t - epsilon) + per_row(self.one_minus_sigma(t), x_t) * epsilon) / per_row(self.alpha(t), x_t)

    def epsilon_to_velocity(self, epsilon: CheckedRows, x_t: CheckedRows, t: CheckedTime) -> Float[Array, "B ..."]:
        """The velocity, given a prediction of the noise."""
        epsilon, x_t = same_rows(epsilon=epsilon, x_t=x_t)
        t = as_time(t, x_t)
        x_1 = self.epsilon_to_x1(epsilon, x_t, t)
        return per_row(self.d_alpha(t), x_t) * x_1 + per_row(self.d_sigma(t), x_t) * epsilon

    def epsilon_to_score(self, epsilon: CheckedRows, x_t: CheckedRows, t: CheckedTime) -> Float[Array, "B ..."]:
        """The score, given E[x_0 | x_t]."""
        epsilon, x_t = same_rows(epsilon=epsilon, x_t=x_t)
        return -epsilon / per_row(self.sigma(as_time(t, x_t)), x_t)

    def score_to_velocity(self, score: CheckedRows, x_t: CheckedRows, t: CheckedTime) -> Float[Array, "B ..."]:
        """The velocity a' / a x_t + (a' s^2 / a - s s') score, given the score; finite where s = 0."""
        score, x_t = same_rows(score=score, x_t=x_t)
        t = as_time(t, x_t)
        a, s = self.alpha(t), self.sigma(t)
        rate = self.d_alpha(t) / a
        return per_row(rate, x_t) * x_t + per_row(rate * s * s - self.sigma_d_sigma(t), x_t) * score


def change_schedule(velocity: Callable, old: Convertible, new: Convertible) -> Callable:
    """A velocity trained along `old`, used along `new`: both see the same data and noise, at other times and scales.

    Args:
      velocity: function (t, x, ...) -> velocity of x [B, ...]; it is asked at the time where `old` has the
        signal-to-noise ratio that `new` has at t, within [0, 1].
      old, new: affine paths.

    Returns:
      A function (t, x, ...) for `sample` and `log_prob`. A model trained on VP never saw the smallest ratios (alpha is
      0.007 at t = 0): there it is asked at t = 0. Where the velocity of `new` is infinite, as VP's at t = 1, it is that
      of the nearest time of `new.time_range`.
    """
    check_function("velocity", velocity)
    for path in (old, new):
        if not isinstance(path, Convertible):
            raise UserError(f"the path is {path!r}, expected an affine one of flow_jax.paths: pass CondOT(), say.")
    return functools.partial(_changed, velocity, old, new)  # which `sample` takes apart: the weights are never old


def _changed(velocity, old: Convertible, new: Convertible, t, x, *args):
    t = jnp.clip(as_time(t, x), *new.time_range)
    alpha, sigma = new.alpha(t), new.sigma(t)
    then = old.time_at(alpha, sigma)
    scale = per_row((alpha + sigma) / (old.alpha(then) + old.sigma(then)), x)
    at = (x / scale).astype(x.dtype)
    v = velocity_at(velocity, then, at, *args)
    x_1, noise = old.velocity_to_x1(v, at, then), old.velocity_to_epsilon(v, at, then)
    return per_row(new.d_alpha(t), x) * x_1 + per_row(new.d_sigma(t), x) * noise
