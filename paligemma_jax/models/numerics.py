"""Numerics that models and losses share: saturating casts, broadcasting, soft caps."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def cast(x: Array, dtype) -> Array:
    """Casts to `dtype`; finite numbers beyond float16 saturate there instead of overflowing to infinity.

    Infinities and NaN stay what they are: they are faults, and whoever watches for those must see them.
    """
    if x.dtype == dtype:
        return x
    if dtype == jnp.float16:
        limit = float(jnp.finfo(dtype).max)
        x = jnp.where(jnp.isinf(x), x, jnp.clip(x, -limit, limit))
    return x.astype(dtype)


def broadcast(x: Array, like: Array) -> Array:
    """Gives x leading axes of size 1 up to the rank of `like`: elsewhere, ranks that differ are a mistake."""
    return lax.expand_dims(x, range(like.ndim - x.ndim))


def soft_cap(x: Array, cap: float | None) -> Array:
    """cap * tanh(x / cap), or x itself when cap is None."""
    return x if cap is None else cap * jnp.tanh(x / cap)
