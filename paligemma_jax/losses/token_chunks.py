"""Splits the tokens of a batch into chunks for a loop; every device splits its own rows.

Axes: B rows, T positions; K chunks of N tokens each.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from train_jax.core import row_sharding
from train_jax.core.errors import UserError

_MIN_CHUNK = 64  # with fewer tokens the product is as slow as reading the embedding


def chunk_per_device(chunk_size: int, array: jax.Array) -> int:
    """Returns the tokens of a chunk on one device, given the global `chunk_size` and an array split by rows."""
    return max(chunk_size // row_sharding.row_parts(len(array)), min(chunk_size, _MIN_CHUNK))


class TokenChunks(NamedTuple):
    """The chunks of a batch's tokens: each has n tokens of each of G groups of neighboring rows, N = G n.

    If B and T were simply flattened, each chunk would lie on one device of a batch sharded by rows; this way every
    device has a part of every chunk.

    Attributes:
      shape: of the batch, [B, ...].
      order: int32 [G, K, n], indices of tokens within a group; those beyond the group are padding.
      used: the first chunks, which have all tokens that count; an integer if every token counts, else an int32 scalar.
    """

    shape: tuple[int, ...]
    order: jax.Array
    used: jax.Array | int

    def slice(self, array: jax.Array, chunk: jax.Array | int) -> jax.Array:
        """Returns the values [N, ...] of one chunk's tokens in an array `[*shape, ...]`, zeros for padding."""
        order = self.order[:, chunk]
        values = jax.vmap(lambda group, index: group.at[index].get(mode="fill", fill_value=0))(
            self._groups(array), order
        )
        # One token axis: with two, XLA would reshape the logits and not reuse their buffer for the gradient.
        return values.reshape(order.size, *values.shape[2:])

    def update(self, array: jax.Array, chunk: jax.Array | int, values: jax.Array) -> jax.Array:
        """Returns an array `[*shape, ...]` with the values [N, ...] of one chunk's tokens replaced."""
        order = self.order[:, chunk]
        groups = jax.vmap(lambda group, index, new: group.at[index].set(new, mode="drop", unique_indices=True))(
            self._groups(array), order, values.reshape(*order.shape, *values.shape[1:])
        )
        return groups.reshape(array.shape)

    def _groups(self, array: jax.Array) -> jax.Array:
        return array.reshape(len(self.order), -1, *array.shape[len(self.shape) :])


def chunks_of(shape: tuple[int, ...], chunk_size: int, counts: jax.Array | None = None) -> TokenChunks:
    """Splits the tokens of a batch into chunks of at most `chunk_size`.

    The number of groups divides B and is at most `chunk_size`; chunks are as even as possible.

    Args:
      shape: of the batch, [B, ...].
      chunk_size: N at most.
      counts: bool [*shape], tokens that count: they fill the first chunks. None if all do.
    """
    groups = max(g for g in range(1, min(shape[0], chunk_size) + 1) if shape[0] % g == 0)
    tokens = math.prod(shape) // groups
    number = max(math.ceil(tokens / (chunk_size // groups)), 1)
    size = math.ceil(tokens / number)
    order, used = jnp.broadcast_to(jnp.arange(number * size), (groups, number * size)), number
    if counts is not None:
        counts = counts.reshape(groups, tokens)
        order = order.at[:, :tokens].set(jnp.argsort(~counts, axis=1, stable=True))
        used = (counts.sum(axis=1, dtype=jnp.int32).max() + size - 1) // size
    return TokenChunks(shape, order.reshape(groups, number, size), used)


def apply_weights(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Returns weights * values, and 0 where the weight is 0 even if the value is not finite."""
    return jnp.where(weights != 0, weights * values, 0.0)


def check_sizes(chunk_size: int, vocab_chunk: int | None) -> None:
    """Raises UserError for a chunk size below 1."""
    for name, size in (("chunk_size", chunk_size), ("vocab_chunk", vocab_chunk)):
        if size is not None and size < 1:
            raise UserError(f"the loss has {name}={size}, expected 1 or more: change it.")
