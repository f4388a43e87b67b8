"""Tokens of a batch in chunks that a scan takes one after another; every device cuts its own rows.

Axes: B rows, T positions; K chunks of N tokens each.
"""

import math

import jax
import jax.numpy as jnp

from train_jax.core import row_sharding
from train_jax.core.errors import UserError

_SMALLEST_SHARE = 64  # of fewer tokens a product takes as long as reading the words does


def own_share(chunk_size: int, array: jax.Array) -> int:
    """Tokens of a chunk on each device, if the rows of such arrays are split over devices: theirs of `chunk_size`."""
    return max(chunk_size // row_sharding.row_parts(len(array)), min(chunk_size, _SMALLEST_SHARE))


def _cut(shape: tuple[int, ...], chunk_size: int) -> tuple[int, int, int]:
    """Groups of rows that share each chunk, chunks, and tokens of a group in a chunk: as even as can be.

    There are as many groups as divide B and leave each a token or more.
    """
    groups = max(g for g in range(1, min(shape[0], chunk_size) + 1) if shape[0] % g == 0)
    tokens = math.prod(shape) // groups
    count = max(math.ceil(tokens / (chunk_size // groups)), 1)
    return groups, count, math.ceil(tokens / count)


def split(array: jax.Array, shape: tuple[int, ...], chunk_size: int) -> jax.Array:
    """`[*shape, ...]` -> chunks `[K, N, ...]` with N <= chunk_size, the last chunk padded with zeros.

    A chunk takes N / G tokens from each of G groups of neighbouring rows. Plain flattening of B and T would put each
    chunk on one device of a batch sharded over rows; so every device works on its share of every chunk.
    """
    groups, count, tokens = _cut(shape, chunk_size)
    tail = array.shape[len(shape) :]
    array = array.reshape(groups, -1, *tail)
    array = jnp.pad(array, [(0, 0), (0, count * tokens - array.shape[1]), *([(0, 0)] * len(tail))])
    chunks = jnp.moveaxis(array.reshape(groups, count, tokens, *tail), 1, 0)
    # The two token axes become one because XLA reuses the logits' buffer for their gradient only without a reshape.
    return chunks.reshape(count, groups * tokens, *tail)


def join(chunks: jax.Array, shape: tuple[int, ...], chunk_size: int) -> jax.Array:
    """Inverse of `split`: `[K, N, ...]` -> `[*shape, ...]`."""
    groups, count, tokens = _cut(shape, chunk_size)
    tail = chunks.shape[2:]
    array = jnp.moveaxis(chunks.reshape(count, groups, tokens, *tail), 0, 1)
    array = array.reshape(groups, count * tokens, *tail)[:, : math.prod(shape) // groups]
    return array.reshape(*shape, *tail)


def weigh(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Their product; 0 where the weight is 0, whatever the value is."""
    return jnp.where(weights != 0, weights * values, 0.0)


def check_sizes(chunk_size: int, vocab_chunk: int | None) -> None:
    """Raises UserError for a chunk of tokens or of words that holds none."""
    for name, size in (("chunk_size", chunk_size), ("vocab_chunk", vocab_chunk)):
        if size is not None and size < 1:
            raise UserError(f"the loss has {name}={size}, expected 1 or more: change it.")
