"""Rotary position embeddings."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotary(x: Float[Array, "B T N H"], positions: Int[Array, "B T"], theta: float) -> Float[Array, "B T N H"]:
    """Applies rotary position embeddings (Su et al. 2021); entries i and i + H/2 form a pair, as in Gemma."""
    half = x.shape[-1] // 2
    timescale = theta ** (jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) / timescale[None, None, None]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
