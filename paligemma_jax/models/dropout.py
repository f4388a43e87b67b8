"""Dropout with one key per example or token, so that splitting or packing a batch does not change its masks."""

import zlib
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key, UInt32

from paligemma_jax.models.numerics import cast

_LEVELS = 1 << 16  # probabilities are multiples of 1 / _LEVELS

DropoutKeys: TypeAlias = Key[Array, " B"] | Key[Array, "B T"]
"""One key for each example, or for each of its tokens."""


def fold_in_name(keys: DropoutKeys, name: str | int | Array) -> DropoutKeys:
    """Folds a name or a number into every key."""
    data = zlib.crc32(name.encode()) if isinstance(name, str) else name
    return _for_each(keys, lambda key: jax.random.fold_in(key, data))


def token_keys(keys: DropoutKeys, positions: Int[Array, "B T"]) -> Key[Array, "B T"]:
    """Returns a key for each token, a function of the key of its example and of its position in it.

    Args:
      keys: of the examples, [B], or of the example of each token, [B, T].
      positions: of the tokens in their example.
    """
    if keys.ndim == 1:
        keys = jnp.broadcast_to(keys[:, None], positions.shape)
    return jax.vmap(jax.vmap(jax.random.fold_in))(keys, positions)


def example_dropout(x: Array, rate: float, keys: DropoutKeys) -> Array:
    """Applies inverted dropout; the mask of an example or token depends on its key alone, not on where it stands.

    Splitting a batch into micro-batches or over devices therefore does not change the masks.
    """
    shape = x.shape[keys.ndim :]
    kept = max(round((1.0 - rate) * _LEVELS), 1)  # of _LEVELS
    keep = _for_each(keys, lambda key: _random_16_bits(key, shape) < kept)
    return jnp.where(keep, cast(x.astype(jnp.float32) / (kept / _LEVELS), x.dtype), jnp.zeros((), x.dtype))


def _random_16_bits(key: Key[Array, ""], shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Returns random integers below _LEVELS; a word of 32 bits makes two, half the work of jax.random.bernoulli."""
    size = shape[-1] if shape else 1
    words = jax.random.bits(key, (*shape[:-1], -(-size // 2)), jnp.uint32)
    both = jnp.concatenate([words & (_LEVELS - 1), words >> 16], axis=-1)
    return both[..., :size].reshape(shape)


def _for_each(keys: DropoutKeys, function):
    """Maps a function over all axes of the keys."""
    for _ in range(keys.ndim):
        function = jax.vmap(function)
    return function(keys)
