"""The marginal path of a Gaussian mixture in closed form, as a reference for models.

Along an affine path from standard normal noise that is independent of the data, a component N(m, s^2 I) of the data
becomes N(alpha m, v I) at time t with v = alpha^2 s^2 + sigma^2, and its field is

  u_k(x) = alpha' m + (alpha alpha' s^2 + sigma sigma') / v (x - alpha m).

The marginal field is the mean of these weighted by p(k | x_t = x) (Lipman et al. 2023, Theorem 1). A finite data set is
a mixture with s = 0.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flow_jax.arrays import AnyArray, Time, as_time
from flow_jax.paths.affine import AffinePath


@dataclasses.dataclass(frozen=True, eq=False)
class MixtureMarginal:
    """The marginals p_t of a Gaussian mixture along a path.

    Attributes:
      path: an affine path.
      means: [K, D].
      stds: [K], or one number for all; 0 for points.
      weights: [K] with sum 1; None for equal weights.
    """

    path: AffinePath
    means: Float[AnyArray, "K D"]
    stds: Float[AnyArray, " K"] | float = 0.0
    weights: Float[AnyArray, " K"] | None = None

    def log_prob(self, x: Float[AnyArray, "B D"], t: Time) -> Float[Array, " B"]:
        """Returns log p_t(x)."""
        return jax.nn.logsumexp(self._terms(x, t)[0], axis=1)

    def velocity(self, t: Time, x: Float[AnyArray, "B D"]) -> Float[Array, "B D"]:
        """Returns the marginal field u_t(x), with the arguments of a velocity model."""
        joint, gap, a, variance, t = self._terms(x, t)
        da = self.path.d_alpha(t)[:, None]
        slope = (a * da * self._stds(x) ** 2 + self.path.sigma_d_sigma(t)[:, None]) / variance
        fields = da[..., None] * jnp.asarray(self.means, x.dtype)[None] + slope[..., None] * gap
        return self._average(joint, fields)

    def score(self, x: Float[AnyArray, "B D"], t: Time) -> Float[Array, "B D"]:
        """Returns grad log p_t(x)."""
        joint, gap, _, variance, _ = self._terms(x, t)
        return self._average(joint, -gap / variance[..., None])

    def denoiser(self, x: Float[AnyArray, "B D"], t: Time) -> Float[Array, "B D"]:
        """Returns E[x_1 | x_t = x]."""
        joint, gap, a, variance, _ = self._terms(x, t)
        towards = (a * self._stds(x) ** 2 / variance)[..., None] * gap
        return self._average(joint, jnp.asarray(self.means, x.dtype)[None] + towards)

    def posterior(self, x: Float[AnyArray, "B D"], t: Time) -> Float[Array, "B K"]:
        """Returns p(k | x_t = x)."""
        return jax.nn.softmax(self._terms(x, t)[0], axis=1)

    def _stds(self, x) -> Float[Array, "1 K"]:
        return jnp.broadcast_to(jnp.asarray(self.stds, x.dtype), (1, len(self.means)))

    def _terms(self, x, t):
        """Returns log w_k N(x; alpha m_k, v_k I) [B, K], x - alpha m_k [B, K, D], alpha [B, 1], v [B, K] and t [B]."""
        means, (B, D) = jnp.asarray(self.means, x.dtype), x.shape
        t = jnp.broadcast_to(as_time(t, x), (B,))
        a, s = self.path.alpha(t)[:, None], self.path.sigma(t)[:, None]
        gap = x[:, None] - a[..., None] * means[None]
        variance = (a * self._stds(x)) ** 2 + s**2
        K = len(means)
        weights = jnp.full((K,), 1 / K, x.dtype) if self.weights is None else jnp.asarray(self.weights, x.dtype)
        normal = -0.5 * ((gap**2).sum(-1) / variance + D * jnp.log(2 * jnp.pi * variance))
        return jnp.log(weights)[None] + normal, gap, a, variance, t

    @staticmethod
    def _average(joint, values):
        return jnp.einsum("bk,bkd->bd", jax.nn.softmax(joint, axis=1), values)
