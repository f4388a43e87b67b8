"""Layer and root-mean-square normalization. Axes: see models."""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from paligemma_jax.models.numerics import broadcast


class LayerNorm(nnx.Module):
    """Layer normalization with scale and bias, computed in float32 (Ba et al. 2016)."""

    def __init__(self, width: int, *, eps: float = 1e-6, param_dtype: str = "float32"):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,), jnp.dtype(param_dtype)))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.dtype(param_dtype)))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalizes the last axis; the result is float32."""
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        scale, bias = (broadcast(param[...].astype(jnp.float32), x) for param in (self.scale, self.bias))
        return x * scale + bias


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
