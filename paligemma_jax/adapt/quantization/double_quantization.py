"""Double quantisation (Dettmers et al. 2023, QLoRA, section 3): the block constants are stored in 8 bits.

Constants are not negative, so their mean is subtracted first; the remainder is stored in the dynamic 8-bit data type in
blocks of 256. With blocks of 64 weights, NF4 then takes 4.127 bits per weight instead of 4.5.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from paligemma_jax.adapt.quantization import dynamic_map

BLOCK = 256


def compress(constants: Float[Array, "R M"]) -> tuple[UInt8[Array, "R M"], Float[Array, " nested"], Float[Array, ""]]:
    """Returns codes, the largest magnitude of each block of 256 constants (in C order), and the mean."""
    rough_mean = constants.mean()
    offset = rough_mean + (constants - rough_mean).mean()  # one float32 pass over half a million constants is inexact
    flat = constants.reshape(-1) - offset
    blocks = jnp.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)
    largest = jnp.abs(blocks).max(axis=1)
    scaled = blocks / jnp.where(largest > 0, largest, 1.0)[:, None]
    codes = dynamic_map.nearest_code(scaled).reshape(-1)[: flat.size]
    return codes.reshape(constants.shape), largest, offset


def expand(
    codes: UInt8[Array, "R M"], largest: Float[Array, " nested"], offset: Float[Array, ""]
) -> Float[Array, "R M"]:
    """Returns the constants that `compress` stored."""
    values = jnp.take(jnp.asarray(dynamic_map.levels()), codes.reshape(-1).astype(jnp.int32))
    scale = jnp.repeat(largest, BLOCK)[: codes.size]
    return (values * scale + offset).reshape(codes.shape)
