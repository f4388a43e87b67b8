"""Matrices as blocks of consecutive weights, and 4-bit codes as bytes, laid out as bitsandbytes lays them.

Blocks run in C order over torch's weight [out, in], on from one row to the next where `in` is no multiple of the
block. To keep an axis that devices can split, what belongs to a matrix is stored in groups of whole rows that begin
and end with a block: [groups, ...]. In memory, and so in the order of bytes, nothing differs from a flat array.

  in a multiple of the block      a group is one row
  in = 4304, block 64             a group is 4 rows, 269 blocks
  no such number of rows          one group, the last block may be short

Axes here: O outputs, I inputs of a matrix, R groups, E weights a group, M blocks a group, K weights a block.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped, UInt8


def num_groups(rows: int, columns: int, block_size: int) -> int:
    """Into how many groups of whole rows and whole blocks a matrix splits; 1 where it does not."""
    together = block_size // math.gcd(columns, block_size)
    return rows // together if rows % together == 0 else 1


def split(matrix: Float[Array, "O I"], block_size: int, pad_mode: str) -> Float[Array, "R M K"]:
    """The blocks of a matrix; a short last block is filled up as `jnp.pad` does in `pad_mode`."""
    groups = num_groups(*matrix.shape, block_size)
    flat = matrix.reshape(groups, -1)
    flat = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % block_size)), pad_mode)
    return flat.reshape(groups, -1, block_size)


def join(groups: Shaped[Array, "R E"], shape: tuple[int, int]) -> Shaped[Array, "O I"]:
    """The matrix of `shape` again."""
    return groups.reshape(shape)


def spread(per_block: Shaped[Array, "R M"], block_size: int, count: int) -> Shaped[Array, "R E"]:
    """One number a block, repeated for each of a group's `count` weights."""
    each = jnp.broadcast_to(per_block[..., None], (*per_block.shape, block_size))
    return each.reshape(per_block.shape[0], -1)[:, :count]


@functools.partial(jax.jit, static_argnums=1)
def pack(codes: UInt8[Array, "R M K"], count: int) -> UInt8[Array, "R bytes"]:
    """Two 4-bit codes a byte, the first in the high nibble, of the first `count` codes of each group.

    After an odd count the last low nibble is the code of the filling.
    """
    flat = codes.reshape(codes.shape[0], -1)[:, : count + count % 2]
    pairs = flat.reshape(codes.shape[0], -1, 2)
    return (pairs[..., 0] << 4) | pairs[..., 1]


def unpack(packed: UInt8[Array, "R bytes"], count: int) -> UInt8[Array, "R E"]:
    """The inverse of `pack`: `count` codes of each group."""
    shifts = jnp.asarray([4, 0], jnp.uint8)[None, None]
    return ((packed[..., None] >> shifts) & 15).reshape(packed.shape[0], -1)[:, :count]
