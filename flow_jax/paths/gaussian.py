"""Paths that add noise around the line between a pair (Tong et al. 2024), and paths of any mean and deviation."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flow_jax.argument_checks import check_key, check_number
from flow_jax.arrays import (
    BatchArray,
    CheckedBatch,
    CheckedTime,
    Number,
    RandomKey,
    as_rows,
    check_shapes,
    per_row,
    same_rows,
)
from flow_jax.callables import call_now
from flow_jax.paths.affine import AffinePath, PathSample, row_times
from flow_jax.paths.schedules import CondOT
from train_jax.core.errors import UserError


def path_noise(name: str, like: BatchArray, key: RandomKey | None, noise: CheckedBatch | None) -> Float[Array, "B ..."]:
    """Returns the given noise, or draws it with the key.

    Raises:
      UserError: neither or both of them are given, or the noise has another shape.
    """
    if key is not None and noise is None:
        check_key("key", key)
        return jax.random.normal(key, like.shape, like.dtype)
    if noise is not None and key is None:
        check_shapes("x_t", like, "its noise", jnp.asarray(noise))
        return jnp.asarray(noise, like.dtype)
    given = "neither" if key is None else "both"
    raise UserError(f"{name} draws noise around its mean: pass `key` or `noise`, one of them (got {given}).")


@dataclasses.dataclass(frozen=True)
class CFM:
    """Noise of constant size around an affine path between a pair: x_t = base(x_0, x_1, t) + sigma noise.

    With the straight line as its base it is Tong et al.'s path, I-CFM for independent pairs and OT-CFM for coupled
    ones; with `base=Cosine()` it is the trigonometric path. The target is the velocity of the base, without the noise.
    """

    sigma: Number = 0.0
    base: AffinePath = CondOT()

    def __post_init__(self):
        check_number("sigma of CFM", self.sigma)
        if not self.sigma >= 0:
            raise UserError(f"CFM(sigma={self.sigma}): expected a standard deviation of 0 or more.")

    @property
    def time_range(self) -> tuple[float, float]:
        """The times at which the target is finite, as for the base."""
        return self.base.time_range

    def mean(self, x_0: CheckedBatch, x_1: CheckedBatch, t: CheckedTime) -> Float[Array, "B ..."]:
        """Returns the mean of x_t."""
        return self.base.sample(x_0, x_1, t).x_t

    def start(self, x_0: BatchArray) -> Float[Array, "B ..."]:
        """Returns the starting points of sampling, as for the base."""
        return self.base.start(x_0)

    def std(self, t):
        """Returns the standard deviation of x_t around its mean."""
        return jnp.full_like(t, self.sigma)

    def score_weight(self, t):
        """Returns 2 std / sigma^2, which makes a score model's loss even over time (Tong et al. 2024, section 4.2)."""
        return 2 * self.std(t) / self.sigma**2

    def sample(
        self,
        x_0: CheckedBatch,
        x_1: CheckedBatch,
        t: CheckedTime,
        key: RandomKey | None = None,
        noise: CheckedBatch | None = None,
    ) -> PathSample:
        """Returns samples as AffinePath.sample does, with noise that is given or drawn with `key`.

        Raises:
          UserError: neither or both of `key` and `noise` are given, unless sigma is zero.
        """
        s = self.base.sample(x_0, x_1, t)
        if self.sigma == 0.0:
            return s
        noise = path_noise(f"CFM(sigma={self.sigma})", s.x_t, key, noise)
        return s._replace(x_t=(s.x_t + self.sigma * noise).astype(s.x_t.dtype))


@dataclasses.dataclass(frozen=True)
class SchrodingerBridge:
    """A Brownian bridge between a pair: x_t = (1 - t) x_0 + t x_1 + sigma sqrt(t (1 - t)) noise (Tong et al. 2024).

    Its marginals are those of the Schroedinger bridge if the pairs come from the entropic coupling with epsilon =
    2 sigma^2 in units of the squared distance: `sinkhorn(..., epsilon=2 * sigma**2, relative=False)`. The pairs of an
    exact coupling do not depend on sigma. The target is infinite at both ends.
    """

    sigma: Number = 1.0
    time_range: ClassVar[tuple[float, float]] = (1e-5, 1.0 - 1e-5)

    def __post_init__(self):
        check_number("sigma of SchrodingerBridge", self.sigma)
        if not self.sigma > 0:
            raise UserError(f"SchrodingerBridge(sigma={self.sigma}): expected a standard deviation above 0.")

    def mean(self, x_0: CheckedBatch, x_1: CheckedBatch, t: CheckedTime) -> Float[Array, "B ..."]:
        """Returns the mean of x_t."""
        return CondOT().sample(x_0, x_1, t).x_t

    def start(self, x_0: BatchArray) -> Float[Array, "B ..."]:
        """Returns the starting points of sampling: x_0 itself."""
        return jnp.asarray(x_0)

    def std(self, t):
        """Returns the standard deviation of x_t around its mean."""
        return self.sigma * jnp.sqrt(t * (1 - t))

    def score_weight(self, t):
        """Returns 2 std / sigma^2, which makes a score model's loss even over time (Tong et al. 2024, section 4.2)."""
        return 2 * self.std(t) / self.sigma**2

    def sample(
        self,
        x_0: CheckedBatch,
        x_1: CheckedBatch,
        t: CheckedTime,
        key: RandomKey | None = None,
        noise: CheckedBatch | None = None,
    ) -> PathSample:
        """Returns samples as AffinePath.sample does, with the bridge's noise given or drawn with `key`.

        Raises:
          UserError: neither or both of `key` and `noise` are given.
        """
        s = CondOT().sample(x_0, x_1, t)
        noise = path_noise(f"SchrodingerBridge(sigma={self.sigma})", s.x_t, key, noise)
        # d/dt of sigma sqrt(t (1 - t)) is sigma (1 - 2 t) / (2 sqrt(t (1 - t))).
        drift = self.sigma * (0.5 - s.t) / jnp.sqrt(s.t * (1 - s.t))
        x_t, dx_t = s.x_t + per_row(self.std(s.t), s.x_t) * noise, s.dx_t + per_row(drift, s.x_t) * noise
        return s._replace(x_t=x_t.astype(s.x_t.dtype), dx_t=dx_t.astype(s.x_t.dtype))


@dataclasses.dataclass(frozen=True)
class GaussianPath:
    """A path p_t(x | x_1) = N(mu, sigma^2) of any mean and deviation, with the field that generates it.

    u_t(x | x_1) = sigma' / sigma (x - mu) + mu' (Lipman et al. 2023, Theorem 3); derivatives are by `jax.jvp`.

    Attributes:
      mu: (t, x_1) -> mean for one example: t is a scalar, x_1 and the result have an example's shape.
      sigma: (t, x_1) -> standard deviation, a scalar or an array of an example's shape.
      time_range: the times at which the target is finite.
    """

    mu: Callable
    sigma: Callable
    time_range: tuple[Number, Number] = (0.0, 1.0)

    def start(self, x_0: BatchArray) -> Float[Array, "B ..."]:
        """Returns the starting points of sampling: x_t at t = 0 for data 0, which should not depend on the data."""
        mean, std, *_ = self.moments(jnp.zeros_like(x_0), 0.0)
        return mean + std * x_0

    def moments(self, x_1: BatchArray, t: CheckedTime) -> tuple[Array, Array, Array, Array]:
        """Returns mean, standard deviation and their time derivatives, each [B, ...].

        Raises:
          UserError: mu does not have an example's shape, or sigma has neither that shape nor is a scalar.
        """
        x_1 = as_rows("x_1", x_1)

        def both(t, x_1):
            mean, std = (jnp.asarray(call_now(function, t, x_1)) for function in (self.mu, self.sigma))
            check_shapes("an example", x_1, "mu of it", mean)
            if std.ndim:
                check_shapes("an example", x_1, "sigma of it", std)
            return mean, jnp.broadcast_to(std, x_1.shape)

        def one(t, x_1):
            return jax.jvp(lambda t: both(t, x_1), (t,), (jnp.ones_like(t),))

        (mean, std), (d_mean, d_std) = jax.vmap(one)(row_times(t, x_1), x_1)
        return mean, std, d_mean, d_std

    def sample(
        self,
        x_0: CheckedBatch,
        x_1: CheckedBatch,
        t: CheckedTime,
        key: RandomKey | None = None,
        noise: CheckedBatch | None = None,
    ) -> PathSample:
        """Returns samples x_t = mu + sigma x_0 with velocity mu' + sigma' x_0; see AffinePath.sample."""
        x_0, x_1 = same_rows(x_0=x_0, x_1=x_1)
        mean, std, d_mean, d_std = self.moments(x_1, t)
        x_t, dx_t = mean + std * x_0, d_mean + d_std * x_0
        return PathSample(x_0, x_1, row_times(t, x_1), x_t.astype(x_1.dtype), dx_t.astype(x_1.dtype))

    def conditional_velocity(self, x: CheckedBatch, x_1: CheckedBatch, t: CheckedTime) -> Float[Array, "B ..."]:
        """Returns u_t(x | x_1)."""
        x, x_1 = same_rows(x=x, x_1=x_1)
        mean, std, d_mean, d_std = self.moments(x_1, t)
        return d_std / std * (x - mean) + d_mean
