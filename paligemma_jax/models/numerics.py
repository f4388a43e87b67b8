"""Numerics shared by models and losses: saturating casts, broadcasting, soft caps."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from train_jax.core import devices


def cast(x: Array, dtype) -> Array:
    """Casts to `dtype`; in float16, finite numbers beyond its range saturate instead of overflowing to infinity.

    Infinities and NaN are kept, so that checks for non-finite values still find them.
    """
    if x.dtype == dtype:
        return x
    if dtype == jnp.float16:
        limit = float(jnp.finfo(dtype).max)
        x = jnp.where(jnp.isinf(x), x, jnp.clip(x, -limit, limit))
    return x.astype(dtype)


@jax.custom_vjp
def materialized(x: Array) -> Array:
    """Returns x, which the compiler does not compute within the products that use it; the backward pass is free.

    XLA on TPUs computes a product's operand within the product, if it can, and repeats that for each tile.
    """
    return lax.optimization_barrier(x) if x.dtype != jnp.float32 and devices.platform() == "tpu" else x


materialized.defvjp(lambda x: (materialized(x), None), lambda _, cotangent: (cotangent,))


def broadcast(x: Array, like: Array) -> Array:
    """Adds leading axes of size 1 to x up to the rank of `like` (implicit rank promotion is an error here)."""
    return lax.expand_dims(x, range(like.ndim - x.ndim))


def soft_cap(x: Array, cap: float | None) -> Array:
    """Returns cap * tanh(x / cap), or x itself when cap is None."""
    return x if cap is None else cap * jnp.tanh(x / cap)
