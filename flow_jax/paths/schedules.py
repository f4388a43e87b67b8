"""The schedules alpha and sigma of affine paths: conditional OT, VP, VE, cosine and polynomial.

`CondOT` is the conditional-OT *path* of Lipman et al. 2023. Derivatives are in closed form; expressions that would
cancel in float32 (sigma of VP near t = 1, for example) are written with expm1, sin^2 and the like.
"""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from flow_jax.argument_checks import check_number
from flow_jax.arrays import BatchArray, Number
from flow_jax.paths.affine import AffinePath
from flow_jax.paths.conversions import Inverse
from train_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class CondOT(AffinePath):
    """The conditional-OT path: alpha = t, sigma = 1 - (1 - sigma_min) t (Lipman et al. 2023, equation 20)."""

    sigma_min: Number = 0.0

    def __post_init__(self):
        check_number("sigma_min of CondOT", self.sigma_min)
        if not 0 <= self.sigma_min <= 1:
            raise UserError(f"CondOT(sigma_min={self.sigma_min}): expected 0 to 1, the size of the noise at t = 1.")

    def alpha(self, t):
        """Returns t."""
        return jnp.asarray(t)

    def sigma(self, t):
        """Returns 1 - (1 - sigma_min) t."""
        return (1 - t) + self.sigma_min * t

    def d_alpha(self, t):
        """Returns 1."""
        return jnp.ones_like(t)

    def d_sigma(self, t):
        """Returns sigma_min - 1."""
        return jnp.full_like(t, self.sigma_min - 1)

    def one_minus_alpha(self, t):
        """Returns 1 - t."""
        return 1 - t

    def one_minus_sigma(self, t):
        """Returns (1 - sigma_min) t."""
        return (1 - self.sigma_min) * t

    def inverse(self, t) -> Inverse:
        """Returns the coefficients of conversions.py, simplified."""
        s, ds, one = self.sigma(t), self.d_sigma(t), jnp.ones_like(t)
        return Inverse(s, -ds, -t, one, t / s, -1 / s)  # w = 1

    def time_at(self, alpha, sigma):
        """Returns the time at which alpha(t) / sigma(t) equals the ratio of the arguments."""
        return alpha / (sigma + (1 - self.sigma_min) * alpha)


@dataclasses.dataclass(frozen=True)
class VP(AffinePath):
    """The variance-preserving diffusion path: alpha = exp(-T/2) and sigma^2 = 1 - alpha^2 (Song et al. 2021).

    T = r beta_min + r^2 (beta_max - beta_min) / 2 with r = 1 - t. As d_sigma is infinite at t = 1, training times end
    1e-5 before (Lipman et al. 2023, appendix).
    """

    beta_min: Number = 0.1
    beta_max: Number = 20.0
    time_range: ClassVar[tuple[float, float]] = (0.0, 1.0 - 1e-5)

    def __post_init__(self):
        check_number("beta_min of VP", self.beta_min)
        check_number("beta_max of VP", self.beta_max)
        if not 0 <= self.beta_min <= self.beta_max or not self.beta_max > 0:
            raise UserError(
                f"VP(beta_min={self.beta_min}, beta_max={self.beta_max}): expected 0 <= beta_min <= beta_max > 0."
            )

    def _exponent(self, t):
        r = 1 - t
        return r * (self.beta_min + r * (0.5 * (self.beta_max - self.beta_min)))

    def _rate(self, t):
        """Returns -dT/dt."""
        return self.beta_min + (1 - t) * (self.beta_max - self.beta_min)

    def alpha(self, t):
        """Returns exp(-T/2)."""
        return jnp.exp(-0.5 * self._exponent(t))

    def sigma(self, t):
        """Returns sqrt(1 - exp(-T))."""
        return jnp.sqrt(-jnp.expm1(-self._exponent(t)))

    def d_alpha(self, t):
        """Returns alpha'(t) = -T'/2 alpha."""
        return 0.5 * self._rate(t) * self.alpha(t)

    def d_sigma(self, t):
        """Returns sigma'(t), infinite at t = 1."""
        return self.sigma_d_sigma(t) / self.sigma(t)

    def sigma_d_sigma(self, t):
        """Returns sigma sigma' = -alpha alpha'."""
        return -self.d_alpha(t) * self.alpha(t)

    def one_minus_alpha(self, t):
        """Returns 1 - exp(-T/2)."""
        return -jnp.expm1(-0.5 * self._exponent(t))

    def one_minus_sigma(self, t):
        """Returns 1 - sigma = alpha^2 / (1 + sigma)."""
        return self.alpha(t) ** 2 / (1 + self.sigma(t))

    def inverse(self, t) -> Inverse:
        """Returns the coefficients of conversions.py, simplified."""
        a, s, rate = self.alpha(t), self.sigma(t), 0.5 * self._rate(t)  # w = a' / s, a' = rate a
        return Inverse(s * s / (rate * a), a, -s / rate, s, 1 / rate, -jnp.ones_like(t))

    def time_at(self, alpha, sigma):
        """Returns the time at which alpha(t) / sigma(t) equals the ratio of the arguments."""
        exponent, slope = jnp.log1p((sigma / alpha) ** 2), self.beta_max - self.beta_min
        r = 2 * exponent / (self.beta_min + jnp.sqrt(self.beta_min**2 + 2 * slope * exponent))
        return 1 - jnp.minimum(jnp.where(jnp.isfinite(exponent), r, 1.0), 1.0)


@dataclasses.dataclass(frozen=True)
class LinearVP(AffinePath):
    """A variance-preserving path with alpha = t and sigma = sqrt(1 - t^2); d_sigma is infinite at t = 1."""

    time_range: ClassVar[tuple[float, float]] = (0.0, 1.0 - 1e-5)

    def alpha(self, t):
        """Returns t."""
        return jnp.asarray(t)

    def sigma(self, t):
        """Returns sqrt(1 - t^2)."""
        return jnp.sqrt((1 - t) * (1 + t))

    def d_alpha(self, t):
        """Returns 1."""
        return jnp.ones_like(t)

    def d_sigma(self, t):
        """Returns -t / sigma, infinite at t = 1."""
        return -t / self.sigma(t)

    def sigma_d_sigma(self, t):
        """Returns sigma sigma' = -t."""
        return -jnp.asarray(t)

    def one_minus_alpha(self, t):
        """Returns 1 - t."""
        return 1 - t

    def one_minus_sigma(self, t):
        """Returns 1 - sigma = t^2 / (1 + sigma)."""
        return t * t / (1 + self.sigma(t))

    def inverse(self, t) -> Inverse:
        """Returns the coefficients of conversions.py, simplified."""
        s = self.sigma(t)  # w = 1 / s
        return Inverse(s * s, jnp.asarray(t), -t * s, s, jnp.asarray(t), -jnp.ones_like(t))

    def time_at(self, alpha, sigma):
        """Returns the time at which alpha(t) / sigma(t) equals the ratio of the arguments."""
        return alpha / jnp.hypot(alpha, sigma)


@dataclasses.dataclass(frozen=True)
class VE(AffinePath):
    """The variance-exploding diffusion path: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^(1 - t).

    x_0 is standard normal, as for all paths, so sampling starts from `start(x_0)` = sigma(0) x_0, not from x_0. The
    prior of `log_prob` is then `likelihood.start_log_prob(path.start)`.
    """

    sigma_min: Number = 0.01
    sigma_max: Number = 50.0

    def __post_init__(self):
        check_number("sigma_min of VE", self.sigma_min)
        check_number("sigma_max of VE", self.sigma_max)
        if not 0 < self.sigma_min < self.sigma_max:
            raise UserError(
                f"VE(sigma_min={self.sigma_min}, sigma_max={self.sigma_max}): expected 0 < sigma_min < sigma_max."
            )

    def start(self, x_0: BatchArray) -> Float[Array, "B ..."]:
        """Returns the starting points of sampling, sigma(0) x_0."""
        return self.sigma_max * jnp.asarray(x_0)

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t):
        """Returns 1."""
        return jnp.ones_like(t)

    def sigma(self, t):
        """Returns sigma_min (sigma_max / sigma_min)^(1 - t)."""
        return self.sigma_min * jnp.exp((1 - t) * self._log_ratio)

    def d_alpha(self, t):
        """Returns 0."""
        return jnp.zeros_like(t)

    def d_sigma(self, t):
        """Returns -log(sigma_max / sigma_min) sigma."""
        return -self._log_ratio * self.sigma(t)

    def one_minus_alpha(self, t):
        """Returns 0."""
        return jnp.zeros_like(t)

    def one_minus_sigma(self, t):
        """Returns 1 - sigma."""
        return 1 - self.sigma(t)

    def time_at(self, alpha, sigma):
        """Returns the time at which alpha(t) / sigma(t) equals the ratio of the arguments."""
        return jnp.clip(1 - jnp.log(sigma / alpha / self.sigma_min) / self._log_ratio, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Cosine(AffinePath):
    """The trigonometric path: alpha = sin(pi t / 2), sigma = cos(pi t / 2)."""

    def alpha(self, t):
        """Returns sin(pi t / 2)."""
        return jnp.sin(0.5 * jnp.pi * t)

    def sigma(self, t):
        """Returns cos(pi t / 2)."""
        return jnp.sin(0.5 * jnp.pi * (1 - t))

    def d_alpha(self, t):
        """Returns pi / 2 cos(pi t / 2)."""
        return 0.5 * jnp.pi * self.sigma(t)

    def d_sigma(self, t):
        """Returns -pi / 2 sin(pi t / 2)."""
        return -0.5 * jnp.pi * self.alpha(t)

    def one_minus_alpha(self, t):
        """Returns 1 - sin(pi t / 2)."""
        return 2 * jnp.sin(0.25 * jnp.pi * (1 - t)) ** 2

    def one_minus_sigma(self, t):
        """Returns 1 - cos(pi t / 2)."""
        return 2 * jnp.sin(0.25 * jnp.pi * t) ** 2

    def time_at(self, alpha, sigma):
        """Returns the time at which alpha(t) / sigma(t) equals the ratio of the arguments."""
        return jnp.arctan2(alpha, sigma) / (0.5 * jnp.pi)


@dataclasses.dataclass(frozen=True)
class Polynomial(AffinePath):
    """The polynomial path: alpha = t^n, sigma = 1 - t^n. n = 1 is CondOT; for n > 1 the velocity is zero at t = 0."""

    n: Number = 2.0

    def __post_init__(self):
        check_number("n of Polynomial", self.n)
        if self.n < 1:
            raise UserError(f"Polynomial(n={self.n}): the velocity is infinite at t = 0, expected n >= 1.")

    def alpha(self, t):
        """Returns t^n."""
        return t**self.n

    def sigma(self, t):
        """Returns 1 - t^n."""
        # At t = 0, log(t) = -inf and expm1 gives the correct -1.
        return -jnp.expm1(self.n * jnp.log(t))

    def d_alpha(self, t):
        """Returns n t^(n - 1)."""
        return self.n * t ** (self.n - 1)

    def d_sigma(self, t):
        """Returns -n t^(n - 1)."""
        return -self.d_alpha(t)

    def one_minus_alpha(self, t):
        """Returns 1 - t^n."""
        return self.sigma(t)

    def one_minus_sigma(self, t):
        """Returns t^n."""
        return self.alpha(t)

    def inverse(self, t) -> Inverse:
        """Returns the coefficients of conversions.py, simplified."""
        s, da, one = self.sigma(t), self.d_alpha(t), jnp.ones_like(t)  # w = a'
        return Inverse(s / da, one, -t / self.n, one, t / (self.n * s), -1 / s)

    def time_at(self, alpha, sigma):
        """Returns the time at which alpha(t) / sigma(t) equals the ratio of the arguments."""
        return (alpha / (alpha + sigma)) ** (1 / self.n)
