"""Linear 4-bit integers: 16 evenly spaced levels from the smallest to the largest weight of a block.

This is a baseline for NF4. It stores two constants per block, so at 4.5 bits per weight (NF4 with blocks of 64) its
blocks have 128 weights, and its error on normal weights is larger. At equal block size it takes half a bit more.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from paligemma_jax.adapt.quantization import blocks
from paligemma_jax.adapt.quantization.nf4 import check_block_size

STEPS = 15


@dataclasses.dataclass(frozen=True)
class Int4:
    """A matrix [O, I] as `codes` uint8 [R, E/2], `minimum` and `step` float32 [R, M]: minimum + code * step."""

    block_size: int = 64

    def __post_init__(self):
        check_block_size("int4", self.block_size)

    @property
    def leaves(self) -> tuple[str, ...]:
        """Names of the arrays."""
        return ("codes", "minimum", "step")

    def encode(self, matrix: Float[Array, "O I"]) -> dict[str, Array]:
        """Returns the arrays of a float32 matrix."""
        codes, minimum, step = _encode_blocks(blocks.split(matrix, self.block_size, "edge"))
        return {"codes": blocks.pack(codes, matrix.size // codes.shape[0]), "minimum": minimum, "step": step}

    def decode(self, arrays: dict[str, Array], shape: tuple[int, int]) -> Float[Array, "O I"]:
        """Returns the float32 matrix of `shape`."""
        minimum, step = arrays["minimum"], arrays["step"]
        count = shape[0] * shape[1] // minimum.shape[0]
        minimum, step = (blocks.repeat_per_weight(constant, self.block_size, count) for constant in (minimum, step))
        return blocks.join(minimum + blocks.unpack(arrays["codes"], count).astype(jnp.float32) * step, shape)


@jax.jit
def _encode_blocks(
    values: Float[Array, "R M K"],
) -> tuple[UInt8[Array, "R M K"], Float[Array, "R M"], Float[Array, "R M"]]:
    """Returns the code of each weight, and the smallest weight and the step of each block."""
    minimum, maximum = values.min(axis=-1), values.max(axis=-1)
    step = (maximum - minimum) / STEPS
    divisor = jnp.where(step > 0, step, 1.0)[..., None]
    codes = jnp.clip(jnp.round((values - minimum[..., None]) / divisor), 0, STEPS)
    return codes.astype(jnp.uint8), minimum, step
