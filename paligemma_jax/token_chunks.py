"""Tokens of a batch in chunks that a scan takes one after another, on every device its share of each.

Axes: B rows, T positions; K chunks of N tokens each.
"""

import math

import jax
import jax.numpy as jnp

from train_jax.core import row_sharding
from train_jax.errors import UserError


def _groups(shape: tuple[int, ...], chunk_size: int) -> int:
    """How many groups of rows share each chunk: the largest divisor of B that leaves each a token or more."""
    return max(g for g in range(1, min(shape[0], chunk_size) + 1) if shape[0] % g == 0)


def own_share(chunk_size: int, array: jax.Array) -> int:
    """How many tokens of each chunk of a batch of such arrays one device takes: those of its rows."""
    return max(chunk_size // row_sharding.row_parts(len(array)), 1)


def split(array: jax.Array, shape: tuple[int, ...], chunk_size: int) -> jax.Array:
    """`[*shape, ...]` -> chunks `[K, N, ...]` with N <= chunk_size, the last chunk padded with zeros.

    A chunk takes N / G tokens from each of G groups of neighbouring rows. Plain flattening of B and T would put each
    chunk on one device of a batch sharded over rows; so every device works on its share of every chunk.
    """
    groups = _groups(shape, chunk_size)
    tail = array.shape[len(shape) :]
    array = array.reshape(groups, -1, *tail)
    tokens = min(chunk_size // groups, array.shape[1])
    array = jnp.pad(array, [(0, 0), (0, -array.shape[1] % tokens), *([(0, 0)] * len(tail))])
    chunks = jnp.moveaxis(array.reshape(groups, -1, tokens, *tail), 1, 0)
    # The two token axes become one because XLA reuses the logits' buffer for their gradient only without a reshape.
    return chunks.reshape(-1, groups * tokens, *tail)


def join(chunks: jax.Array, shape: tuple[int, ...], chunk_size: int) -> jax.Array:
    """Inverse of `split`: `[K, N, ...]` -> `[*shape, ...]`."""
    groups = _groups(shape, chunk_size)
    count, tokens, *tail = chunks.shape
    array = jnp.moveaxis(chunks.reshape(count, groups, tokens // groups, *tail), 0, 1)
    array = array.reshape(groups, -1, *tail)[:, : math.prod(shape) // groups]
    return array.reshape(*shape, *tail)


def weigh(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Their product; 0 where the weight is 0, whatever the value is."""
    return jnp.where(weights != 0, weights * values, 0.0)


def check_sizes(chunk_size: int, vocab_chunk: int | None) -> None:
    """Raises UserError for a chunk of tokens or of words that holds none."""
    for name, size in (("chunk_size", chunk_size), ("vocab_chunk", vocab_chunk)):
        if size is not None and size < 1:
            raise UserError(f"the loss has {name}={size}, expected 1 or more: change it.")
