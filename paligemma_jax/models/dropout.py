"""Dropout whose masks depend on an example's key alone, so that a batch may be cut anywhere."""

import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from paligemma_jax.models.numerics import cast


def fold_in_name(keys: Key[Array, " B"], name: str | int | Array) -> Key[Array, " B"]:
    """Folds a name or a number into one key an example."""
    data = zlib.crc32(name.encode()) if isinstance(name, str) else name
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)


def example_dropout(x: Array, rate: float, keys: Key[Array, " B"]) -> Array:
    """Inverted dropout whose mask depends on the example's key alone, not on its place in the batch.

    So splitting a batch into micro-batches, or over devices, leaves the masks as they are.
    """
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, cast(x.astype(jnp.float32) / (1.0 - rate), x.dtype), jnp.zeros((), x.dtype))
