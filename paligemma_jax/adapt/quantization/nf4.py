"""4-bit NormalFloat (Dettmers et al. 2023, QLoRA): 16 levels at quantiles of a normal, scaled by each block's absmax.

Codes, constants and their order are identical to those of bitsandbytes; see blocks.py for the layout.
"""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, UInt8

from paligemma_jax.adapt.quantization import blocks, double_quantization
from train_jax.core.errors import UserError

BLOCK_SIZES = (64, 128)
LEVELS = np.asarray(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
MIDPOINTS = (LEVELS[1:] + LEVELS[:-1]) / np.float32(2)
SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)


def quantize(
    array: Num[Array, "*shape"] | Num[np.ndarray, "*shape"], block_size: int = 64
) -> tuple[UInt8[Array, " bytes"], Float[Array, " blocks"]]:
    """Quantises an array in C order, in blocks of consecutive elements.

    Args:
      array: of any shape and float dtype; the last block may be short.
      block_size: 64 or 128.

    Returns:
      codes: uint8 [(n + 1) // 2], two codes per byte, the first in the high nibble; if n is odd, the last low nibble is
        7 (zero).
      absmax: float32 [ceil(n / block_size)], the largest magnitude of each block.

    Raises:
      UserError: an unsupported block size.
    """
    arrays = NF4(block_size).encode(jnp.asarray(array, jnp.float32).reshape(1, -1))
    return arrays["codes"][0], arrays["absmax"][0]


def dequantize(
    codes: UInt8[Array, " bytes"] | UInt8[np.ndarray, " bytes"],
    absmax: Float[Array, " blocks"] | Float[np.ndarray, " blocks"],
    shape: tuple[int, ...],
) -> Float[Array, "..."]:
    """Returns the float32 array of `shape` that `quantize` stored; the number of blocks determines the block size.

    Raises:
      UserError: codes and absmax do not belong to an array of this shape.
    """
    count = int(np.prod(shape))
    sizes = [size for size in BLOCK_SIZES if -(-count // size) == absmax.size]
    if codes.size != (count + 1) // 2 or not sizes:
        raise UserError(
            f"{codes.size} bytes of NF4 codes and {absmax.size} block constants do not make an array of shape "
            f"{tuple(shape)} in blocks of {' or '.join(map(str, BLOCK_SIZES))}: give the shape that was quantised."
        )
    arrays = {"codes": jnp.asarray(codes)[None], "absmax": jnp.asarray(absmax)[None]}
    return NF4(sizes[0]).decode(arrays, (1, count)).reshape(shape)


@dataclasses.dataclass(frozen=True)
class NF4:
    """A matrix [O, I] as `codes` uint8 [R, E/2] and `absmax` float32 [R, M].

    With `double`, `absmax` is the constant's uint8 code, which `nested_absmax` float32 [R M / 256] and `offset`
    float32 [] decode.
    """

    block_size: int = 64
    double: bool = False

    def __post_init__(self):
        check_block_size("nf4", self.block_size)

    @property
    def leaves(self) -> tuple[str, ...]:
        """Names of the arrays."""
        return ("codes", "absmax", *(("nested_absmax", "offset") if self.double else ()))

    def encode(self, matrix: Float[Array, "O I"]) -> dict[str, Array]:
        """Returns the arrays of a float32 matrix."""
        codes, absmax = _encode_blocks(blocks.split(matrix, self.block_size, "constant"))
        arrays = {"codes": blocks.pack(codes, matrix.size // codes.shape[0]), "absmax": absmax}
        if self.double:
            arrays |= zip(self.leaves[1:], double_quantization.compress(absmax), strict=True)
        return arrays

    def constants(self, arrays: dict[str, Array]) -> Float[Array, "R M"]:
        """Returns the absmax of each block."""
        if not self.double:
            return arrays["absmax"]
        return double_quantization.expand(arrays["absmax"], arrays["nested_absmax"], arrays["offset"])

    def decode(self, arrays: dict[str, Array], shape: tuple[int, int]) -> Float[Array, "O I"]:
        """Returns the float32 matrix of `shape`."""
        absmax = self.constants(arrays)
        count = shape[0] * shape[1] // absmax.shape[0]
        levels = level(blocks.unpack(arrays["codes"], count))
        return blocks.join(levels * blocks.repeat_per_weight(absmax, self.block_size, count), shape)


@jax.jit
def _encode_blocks(values: Float[Array, "R M K"]) -> tuple[UInt8[Array, "R M K"], Float[Array, "R M"]]:
    """Returns the code of each weight and the absmax of each block."""
    absmax = jnp.abs(values).max(axis=-1)
    # Blocks with an absmax too small to divide by become zeros.
    inverse = jnp.where(absmax < SMALLEST_NORMAL, 0.0, 1.0 / absmax)
    return nearest_code(jnp.clip(values * inverse[..., None], -1.0, 1.0)), absmax


def nearest_code(scaled: Float[Array, "*n"]) -> UInt8[Array, "*n"]:
    """Returns the index of the nearest level for numbers in [-1, 1], by 15 comparisons; ties go to the lower level."""
    # A cast, as the sum of an empty sequence would be 0.
    return cast(Array, sum((scaled > midpoint).astype(jnp.uint8) for midpoint in MIDPOINTS))


def level(codes: UInt8[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns the level of each code.

    It is a look-up instead of nested selections among constants, because differentiation of a scan would hoist these
    out of the loop and broadcast each of the sixteen to the size of the kernel.
    """
    return jnp.asarray(LEVELS).at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")


def check_block_size(kind: str, block_size: int) -> None:
    """Raises UserError for a block size that the 4-bit kinds do not support."""
    if block_size not in BLOCK_SIZES:
        raise UserError(
            f"the block size of {kind} is {block_size}, expected {' or '.join(map(str, BLOCK_SIZES))}: choose one of "
            "these."
        )
