"""Splits the tokens of a batch into chunks for a scan; every device splits its own rows.

Axes: B rows, T positions; K chunks of N tokens each.
"""

import math

import jax
import jax.numpy as jnp

from train_jax.core import row_sharding
from train_jax.core.errors import UserError

_MIN_CHUNK = 64  # with fewer tokens the product is as slow as reading the embedding


def chunk_per_device(chunk_size: int, array: jax.Array) -> int:
    """Returns the tokens of a chunk on one device, given the global `chunk_size` and an array split by rows."""
    return max(chunk_size // row_sharding.row_parts(len(array)), min(chunk_size, _MIN_CHUNK))


def _chunk_shape(shape: tuple[int, ...], chunk_size: int) -> tuple[int, int, int]:
    """Returns the number of row groups that share each chunk, of chunks, and of a group's tokens in a chunk.

    The number of groups divides B and is at most `chunk_size`; chunks are as even as possible.
    """
    groups = max(g for g in range(1, min(shape[0], chunk_size) + 1) if shape[0] % g == 0)
    tokens = math.prod(shape) // groups
    count = max(math.ceil(tokens / (chunk_size // groups)), 1)
    return groups, count, math.ceil(tokens / count)


def split(array: jax.Array, shape: tuple[int, ...], chunk_size: int) -> jax.Array:
    """Splits `[*shape, ...]` into chunks `[K, N, ...]` with N <= chunk_size; the last chunk is padded with zeros.

    A chunk has N / G tokens of each of G groups of neighboring rows. If B and T were simply flattened, each chunk would
    lie on one device of a batch sharded by rows; this way every device has a part of every chunk.
    """
    groups, count, tokens = _chunk_shape(shape, chunk_size)
    tail = array.shape[len(shape) :]
    array = array.reshape(groups, -1, *tail)
    array = jnp.pad(array, [(0, 0), (0, count * tokens - array.shape[1]), *([(0, 0)] * len(tail))])
    chunks = jnp.moveaxis(array.reshape(groups, count, tokens, *tail), 1, 0)
    # One token axis: with two, XLA would reshape the logits and not reuse their buffer for the gradient.
    return chunks.reshape(count, groups * tokens, *tail)


def join(chunks: jax.Array, shape: tuple[int, ...], chunk_size: int) -> jax.Array:
    """Joins chunks `[K, N, ...]` to `[*shape, ...]`, the inverse of `split`."""
    groups, count, tokens = _chunk_shape(shape, chunk_size)
    tail = chunks.shape[2:]
    array = jnp.moveaxis(chunks.reshape(count, groups, tokens, *tail), 0, 1)
    array = array.reshape(groups, count * tokens, *tail)[:, : math.prod(shape) // groups]
    return array.reshape(*shape, *tail)


def apply_weights(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Returns weights * values, and 0 where the weight is 0 even if the value is not finite."""
    return jnp.where(weights != 0, weights * values, 0.0)


def check_sizes(chunk_size: int, vocab_chunk: int | None) -> None:
    """Raises UserError for a chunk size below 1."""
    for name, size in (("chunk_size", chunk_size), ("vocab_chunk", vocab_chunk)):
        if size is not None and size < 1:
            raise UserError(f"the loss has {name}={size}, expected 1 or more: change it.")
