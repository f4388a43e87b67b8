"""Distributions of training times, and time grids for samplers.

Times drawn with density q weigh the loss at t by q(t). Each distribution has its log-density, and `importance_weights`
1 / q(t) restore the objective of uniform times, at another variance.
"""

import abc
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flow_jax.argument_checks import check_key, check_number, check_whole
from flow_jax.arrays import AnyArray, Number, RandomKey
from flow_jax.row_keys import RowKeys
from train_jax.core.errors import UserError


class Times(abc.ABC):
    """A distribution of times in [0, 1]; a subclass defines `draw` and `log_density`."""

    @abc.abstractmethod
    def draw(self, key: RandomKey, n: int) -> Float[Array, " n"]:
        """Draws n times."""

    @abc.abstractmethod
    def log_density(self, t: Float[AnyArray, " B"]) -> Float[Array, " B"]:
        """Returns log q(t), -inf outside the distribution's range."""

    def draw_rows(
        self, keys: RowKeys, rows: Int[AnyArray, " B"] | None = None, n: int | None = None
    ) -> Float[Array, " B"]:
        """Draws a time for each row by the row's own key, so that any part of a batch can be drawn by itself.

        Args:
          keys: one for each row.
          rows: numbers of the rows in the batch; 0, 1, ... if None.
          n: size of the whole batch; the number of keys if None.
        """
        return jax.vmap(lambda key: self.draw(key, 1)[0])(keys)

    def importance_weights(self, t: Float[AnyArray, " B"]) -> Float[Array, " B"]:
        """Returns 1 / q(t), the weights under which the mean loss is that of uniform times on [0, 1]."""
        return jnp.exp(-self.log_density(t))


def _check_range(low: Number, high: Number) -> None:
    for name, number in dict(low=low, high=high).items():
        check_number(name, number)
    if not 0.0 <= low < high <= 1.0:
        raise UserError(f"times range from {low:g} to {high:g}, expected 0 <= low < high <= 1.")


@dataclasses.dataclass(frozen=True)
class Uniform(Times):
    """Independent uniform times in [low, high). Pass a path's `time_range`, in which its targets are finite."""

    low: Number = 0.0
    high: Number = 1.0

    def __post_init__(self):
        _check_range(self.low, self.high)

    def draw(self, key: RandomKey, n: int) -> Float[Array, " n"]:
        """Draws n times."""
        check_whole("n", n, 0)
        check_key("key", key)
        return jax.random.uniform(key, (n,), minval=self.low, maxval=self.high)

    def log_density(self, t: Float[AnyArray, " B"]) -> Float[Array, " B"]:
        """Returns log q(t), -inf outside the range."""
        t = jnp.asarray(t)
        inside = (t >= self.low) & (t <= self.high)
        return jnp.where(inside, -jnp.log(self.high - self.low), -jnp.inf)


@dataclasses.dataclass(frozen=True)
class Stratified(Uniform):
    """Uniform times, one in each of n equal parts of the range, in random order, which reduces the variance."""

    def draw(self, key: RandomKey, n: int) -> Float[Array, " n"]:
        """Draws n times."""
        check_whole("n", n, 0)
        check_key("key", key)
        offsets, order = jax.random.split(key)
        parts = (jnp.arange(n) + jax.random.uniform(offsets, (n,))) / n
        return self.low + (self.high - self.low) * jax.random.permutation(order, jnp.minimum(parts, 1.0))

    def draw_rows(
        self, keys: RowKeys, rows: Int[AnyArray, " B"] | None = None, n: int | None = None
    ) -> Float[Array, " B"]:
        """Draws a time in part r for each row r. Batches are shuffled, so the parts need not be."""
        rows = jnp.arange(len(keys)) if rows is None else jnp.asarray(rows)
        parts = (rows + jax.vmap(jax.random.uniform)(keys)) / (n or len(keys))
        return self.low + (self.high - self.low) * jnp.minimum(parts, 1.0)


@dataclasses.dataclass(frozen=True)
class LogitNormal(Times):
    """Times whose logit is N(mean, std^2), most of them in the middle (Esser et al. 2024).

    A mean above 0 moves them towards the data, one below 0 towards the noise.
    """

    mean: Number = 0.0
    std: Number = 1.0

    def __post_init__(self):
        check_number("the mean of LogitNormal", self.mean)
        check_number("the std of LogitNormal", self.std, 0.0, above=True)

    def draw(self, key: RandomKey, n: int) -> Float[Array, " n"]:
        """Draws n times."""
        check_whole("n", n, 0)
        check_key("key", key)
        return jax.nn.sigmoid(self.mean + self.std * jax.random.normal(key, (n,)))

    def log_density(self, t: Float[AnyArray, " B"]) -> Float[Array, " B"]:
        """Returns log q(t)."""
        t = jnp.asarray(t)
        z = (jax.scipy.special.logit(t) - self.mean) / self.std
        return -0.5 * z**2 - jnp.log(self.std * jnp.sqrt(2 * jnp.pi)) - jnp.log(t) - jnp.log1p(-t)


def edm_skewed(mean: Number = -1.2, std: Number = 1.2) -> LogitNormal:
    """Returns the times t = 1 / (1 + sigma) of EDM's noise levels, log sigma ~ N(mean, std^2).

    The defaults are those of Karras et al. 2022, table 1.
    """
    return LogitNormal(-mean, std)


def uniform_grid(num_steps: int) -> np.ndarray:
    """Returns `num_steps` + 1 equally spaced times from 0 to 1."""
    check_whole("num_steps", num_steps)
    return np.linspace(0.0, 1.0, num_steps + 1)


def edm_grid(
    num_steps: int, sigma_min: Number = 0.002, sigma_max: Number = 80.0, rho: Number = 7.0, *, from_noise: bool = True
) -> np.ndarray:
    """Returns EDM's noise levels as times t = 1 / (1 + sigma) of the conditional-OT path: short steps near the data.

    Args:
      num_steps: number of steps.
      sigma_min, sigma_max, rho: sigma^(1 / rho) falls linearly between the two levels; a last step leads to sigma = 0
        (Karras et al. 2022, eq. 5).
      from_noise: start at t = 0, where x is standard normal, instead of 1 / (1 + sigma_max).

    Returns:
      [num_steps + 1], increasing, the last 1.
    """
    check_whole("num_steps", num_steps, 2)
    check_number("sigma_min", sigma_min, 0.0, above=True)
    check_number("sigma_max", sigma_max, 0.0, above=True)
    check_number("rho", rho, 0.0, above=True)
    if sigma_min >= sigma_max:
        raise UserError(f"sigma_min is {sigma_min:g} and sigma_max {sigma_max:g}, expected sigma_min < sigma_max.")
    ramp = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_steps)
    times = 1 / (1 + np.append(ramp**rho, 0.0))
    if from_noise:
        times[0] = 0.0
    return times
