"""Splits matrices into blocks of consecutive weights and packs 4-bit codes to bytes, in the layout of bitsandbytes.

Blocks run in C order over torch's weight [out, in]; a block may span rows if `in` is not a multiple of the block size.
So that devices can split an axis, arrays are stored in groups of whole rows that begin and end with a block:
[groups, ...]. The order of bytes in memory is that of a flat array.

  in a multiple of the block size   a group is one row
  in = 4304, block size 64          a group is 4 rows, 269 blocks
  no such number of rows            one group, the last block may be short

Axes here: O outputs, I inputs of a matrix, R groups, E weights per group, M blocks per group, K weights per block.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped, UInt8


def num_groups(rows: int, columns: int, block_size: int) -> int:
    """Returns the number of groups of whole rows and whole blocks that a matrix splits into, or 1."""
    rows_per_group = block_size // math.gcd(columns, block_size)
    return rows // rows_per_group if rows % rows_per_group == 0 else 1


def split(matrix: Float[Array, "O I"], block_size: int, pad_mode: str) -> Float[Array, "R M K"]:
    """Splits a matrix into blocks; a short last block is padded with `jnp.pad` in `pad_mode`."""
    rows, columns = matrix.shape
    groups = num_groups(rows, columns, block_size)
    flat = matrix.reshape(groups, -1)
    flat = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % block_size)), pad_mode)
    return flat.reshape(groups, -1, block_size)


def join(groups: Shaped[Array, "R E"], shape: tuple[int, int]) -> Shaped[Array, "O I"]:
    """Joins groups of weights to the matrix of `shape`."""
    return groups.reshape(shape)


def repeat_per_weight(per_block: Shaped[Array, "R M"], block_size: int, count: int) -> Shaped[Array, "R E"]:
    """Repeats one number per block for each of a group's `count` weights."""
    per_weight = jnp.broadcast_to(per_block[..., None], (*per_block.shape, block_size))
    return per_weight.reshape(per_block.shape[0], -1)[:, :count]


@functools.partial(jax.jit, static_argnums=1)
def pack(codes: UInt8[Array, "R M K"], count: int) -> UInt8[Array, "R bytes"]:
    """Packs the first `count` codes of each group, two 4-bit codes per byte, the first in the high nibble.

    If the count is odd, the last low nibble is a code of the padding.
    """
    flat = codes.reshape(codes.shape[0], -1)[:, : count + count % 2]
    pairs = flat.reshape(codes.shape[0], -1, 2)
    return (pairs[..., 0] << 4) | pairs[..., 1]


def unpack(packed: UInt8[Array, "R bytes"], count: int) -> UInt8[Array, "R E"]:
    """Returns `count` codes of each group, the inverse of `pack`."""
    shifts = jnp.asarray([4, 0], jnp.uint8)[None, None]
    return ((packed[..., None] >> shifts) & 15).reshape(packed.shape[0], -1)[:, :count]
