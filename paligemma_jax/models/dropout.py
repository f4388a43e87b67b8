"""Dropout with one key per example, so that splitting a batch does not change its masks."""

import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from paligemma_jax.models.numerics import cast


def fold_in_name(keys: Key[Array, " B"], name: str | int | Array) -> Key[Array, " B"]:
    """Folds a name or a number into the key of each example."""
    data = zlib.crc32(name.encode()) if isinstance(name, str) else name
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)


def example_dropout(x: Array, rate: float, keys: Key[Array, " B"]) -> Array:
    """Applies inverted dropout; the mask of an example depends on its key alone, not on its index in the batch.

    Splitting a batch into micro-batches or over devices therefore does not change the masks.
    """
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, cast(x.astype(jnp.float32) / (1.0 - rate), x.dtype), jnp.zeros((), x.dtype))
