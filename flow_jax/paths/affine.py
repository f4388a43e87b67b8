"""`AffinePath`, the base class of paths x_t = alpha(t) x_1 + sigma(t) x_0 from noise x_0 (t = 0) to data x_1 (t = 1).

Pairing noise with data by minibatch optimal transport is a *coupling* (couplings/pairings.py) and can be combined with
any path.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from flow_jax.arrays import (
    BatchArray,
    CheckedBatch,
    CheckedTime,
    RandomKey,
    as_time,
    per_row,
    same_rows,
)
from flow_jax.paths.conversions import Convertible, Inverse
from train_jax.core.errors import UserError


class PathSample(NamedTuple):
    """Points on the paths between pairs of noise and data.

    Attributes:
      x_0: noise.
      x_1: data.
      t: times, from 0 (noise) to 1 (data).
      x_t: the points.
      dx_t: time derivative of the path at x_t, the target of a velocity model at (t, x_t).
    """

    x_0: Float[Array, "B ..."]
    x_1: Float[Array, "B ..."]
    t: Float[Array, " B"]
    x_t: Float[Array, "B ..."]
    dx_t: Float[Array, "B ..."]


def row_times(t: CheckedTime, x: BatchArray) -> Float[Array, " B"]:
    """Returns one time for each row; see `as_time`."""
    return jnp.broadcast_to(as_time(t, x), x.shape[:1])


def checked(sample: PathSample) -> PathSample:
    """Checks a sample and returns it with one time for each row.

    Raises:
      UserError: it is not a PathSample, or the shapes of x_t, dx_t and t do not match.
    """
    if not all(hasattr(sample, name) for name in PathSample._fields):
        kind = type(sample).__name__
        raise UserError(f"the sample is a {kind}, expected a PathSample: pass path.sample(x_0, x_1, t).")
    x_t, dx_t = same_rows(x_t=sample.x_t, dx_t=sample.dx_t)
    return sample._replace(x_t=x_t, dx_t=dx_t, t=row_times(sample.t, x_t))


class AffinePath(Convertible):
    """An affine path; a subclass defines the schedule and its derivatives for times of any shape."""

    def inverse(self, t) -> Inverse:
        """Returns the coefficients of conversions.py for a schedule whose derivatives are finite."""
        a, s, da, ds = self.alpha(t), self.sigma(t), self.d_alpha(t), self.d_sigma(t)
        w = da * s - a * ds
        return Inverse(s / w, -ds / w, -a / w, da / w, a / (w * s), -da / (w * s))

    def signal_to_noise(self, t):
        """Returns alpha(t) / sigma(t), infinite where sigma is zero."""
        return self.alpha(t) / self.sigma(t)

    def sample(
        self,
        x_0: CheckedBatch,
        x_1: CheckedBatch,
        t: CheckedTime,
        key: RandomKey | None = None,
        noise: CheckedBatch | None = None,
    ) -> PathSample:
        """Returns the points at times t on the paths from x_0 to x_1.

        Args:
          x_0: noise [B, ...]; row i is paired with row i of x_1.
          x_1: data [B, ...].
          t: one time for the batch, or one for each row.
          key, noise: not used, as x_0 and x_1 determine x_t; all paths take the same arguments.

        Raises:
          UserError: the shapes of x_0, x_1 and t do not match.
        """
        x_0, x_1 = same_rows(x_0=x_0, x_1=x_1)
        t = row_times(t, x_1)
        x_t = per_row(self.alpha(t), x_1) * x_1 + per_row(self.sigma(t), x_1) * x_0
        dx_t = per_row(self.d_alpha(t), x_1) * x_1 + per_row(self.d_sigma(t), x_1) * x_0
        return PathSample(x_0, x_1, t, x_t.astype(x_1.dtype), dx_t.astype(x_1.dtype))

    def start(self, x_0: BatchArray) -> Float[Array, "B ..."]:
        """Returns the starting points of sampling: x_t at t = 0 for noise x_0, without the data's part."""
        return jnp.asarray(x_0)

    def conditional_velocity(self, x: CheckedBatch, x_1: CheckedBatch, t: CheckedTime) -> Float[Array, "B ..."]:
        """Returns u_t(x | x_1), whose flow maps N(0, I) to N(alpha x_1, sigma^2 I) (Lipman et al., Theorem 3)."""
        return self.x1_to_velocity(x_1, x, t)
