"""Layer and root-mean-square normalization. Axes: see models."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from paligemma_jax.models.numerics import broadcast

STATISTICS = "statistics"  # name of means and variances for policies of `jax.checkpoint`


class LayerNorm(nnx.Module):
    """Layer normalization with scale and bias, computed in float32 (Ba et al. 2016)."""

    def __init__(self, width: int, *, eps: float = 1e-6, param_dtype: str = "float32"):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,), jnp.dtype(param_dtype)))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.dtype(param_dtype)))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalizes the last axis; the result is float32."""
        scale, bias = (param[...].astype(jnp.float32) for param in (self.scale, self.bias))
        return _layer_norm(self.eps, x.astype(jnp.float32), scale, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _layer_norm(eps: float, x: Array, scale: Array, bias: Array) -> Array:
    return _layer_norm_forward(eps, x, scale, bias)[0]


def _layer_norm_forward(eps: float, x: Array, scale: Array, bias: Array):
    mean = checkpoint_name(x.mean(-1, keepdims=True), STATISTICS)
    # A mean of squares less the squared mean would be one pass, but loses the variance of rows far from zero.
    inverse = checkpoint_name(lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + eps), STATISTICS)
    y = (x - mean) * inverse * broadcast(scale, x) + broadcast(bias, x)
    return y, (x, mean, inverse, scale)


def _layer_norm_backward(eps: float, residuals: tuple[Array, Array, Array, Array], d_y: Array):
    """Autodiff would compute the mean over D of a sum that has such a mean in it: one more pass over the array."""
    x, mean, inverse, scale = residuals
    normal = (x - mean) * inverse
    rows = tuple(range(x.ndim - 1))
    d_normal = d_y * broadcast(scale, x)
    both = d_normal.mean(-1, keepdims=True) + normal * (d_normal * normal).mean(-1, keepdims=True)
    return inverse * (d_normal - both), (d_y * normal).sum(rows), d_y.sum(rows)


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class RMSNorm(nnx.Module):
    """Root-mean-square norm with Gemma's zero-centered scale: x / rms(x) * (1 + w), float32 (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, *, eps: float = 1e-6, param_dtype: str = "float32"):
        self.eps = eps
        self.scale = nnx.Param(jnp.zeros((width,), jnp.dtype(param_dtype)))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalizes the last axis; the result is float32."""
        x = x.astype(jnp.float32)
        x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return x * broadcast(1.0 + self.scale[...].astype(jnp.float32), x)
