"""NF4 on TPUs: Pallas kernels that dequantise a matrix, and that multiply few rows with one layer of a stack.

XLA turns the unpacking of two codes per byte into a broadcast and a shuffle, and the look-up of levels into a gather
from memory. Here all of it happens in registers, by gathers along the 128 lanes of a vector: one brings each byte to
its two weights, one looks up the level, and one brings a block's constant to its weights. The result equals that of
`NF4.decode`, rounded to bfloat16, bit for bit.

Axes: L layers, N rows, O outputs, I inputs, M blocks of a row.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, BFloat16, Float, Int, Shaped, UInt8

from paligemma_jax.adapt.quantization.nf4 import LEVELS

LANES = 128
_STRIPE = 2 * LANES  # weights in 128 bytes
_CODES_PER_STEP = 1 << 20  # bytes of codes that a step of a kernel holds, twice
_VMEM = 64 << 20


@functools.partial(jax.jit, static_argnames=("block_size", "interpret"))
def dequantize(
    codes: UInt8[Array, "O columns"], absmax: Float[Array, "O M"], *, block_size: int, interpret: bool = False
) -> BFloat16[Array, "O I"]:
    """Returns a matrix, or one of groups as in blocks.py, in bfloat16, with two columns per byte of codes."""
    rows, weights = codes.shape[0], 2 * codes.shape[1]
    codes = _pad(codes, (LANES, LANES))
    (outputs, columns), blocks = codes.shape, 2 * codes.shape[1] // block_size
    absmax = jnp.pad(absmax, ((0, outputs - rows), (0, blocks - absmax.shape[1])))
    tile = _tile(outputs, columns)

    def kernel(levels, codes, absmax, out, constants):
        constants[...] = _by_output(absmax[...])
        stripe = functools.partial(_stripe, levels, codes, constants, block_size=block_size)

        def step(index, _):
            out[:, pl.ds(index * _STRIPE, _STRIPE)] = stripe(index)
            return 0

        lax.fori_loop(0, columns // LANES, step, 0)

    matrix = pl.pallas_call(
        kernel,
        grid=(outputs // tile,),
        in_specs=[
            pl.BlockSpec((1, LANES), lambda i: (0, 0)),
            pl.BlockSpec((tile, columns), lambda i: (i, 0)),
            pl.BlockSpec((blocks, tile), lambda i: (0, i)),
        ],
        out_specs=pl.BlockSpec((tile, 2 * columns), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((outputs, 2 * columns), jnp.bfloat16),
        scratch_shapes=[pltpu.VMEM((tile, _whole_lanes(blocks)), jnp.float32)],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=_VMEM),
        interpret=interpret,
    )(_levels(), codes, absmax.T)
    return matrix[:rows, :weights]


def supports_product(codes_shape: tuple[int, ...], outputs: int, block_size: int) -> bool:
    """Returns whether `product` takes codes [L, R, columns] of a matrix with so many outputs: one group for each."""
    rows, columns = codes_shape[-2:]
    return rows == outputs and rows % LANES == 0 and columns % LANES == 0 and 2 * columns % block_size == 0


@functools.partial(jax.jit, static_argnames="interpret")
def product(
    x: BFloat16[Array, "N I"],
    codes: UInt8[Array, "L O columns"],
    absmax: Float[Array, "L M O"],
    layer: Int[Array, ""],
    *,
    interpret: bool = False,
) -> Float[Array, "N O"]:
    """Returns x W^T for the matrix W of one layer, in float32; `supports_product` says for which shapes.

    W is dequantised in registers and never written to memory, and the stack is not copied. N is a multiple of 16;
    constants are transposed, as the memory of a TPU would pad a short last axis.
    """
    _, outputs, columns = codes.shape
    tile, blocks, rows = _tile(outputs, columns), absmax.shape[1], len(x)

    def kernel(_, levels, x, codes, absmax, out, constants):
        constants[...] = _by_output(absmax[0])
        stripe = functools.partial(_stripe, levels, codes.at[0], constants, block_size=2 * columns // blocks)

        def step(index, total):
            part = x[:, pl.ds(index * _STRIPE, _STRIPE)]
            both = (((1,), (1,)), ((), ()))
            return total + lax.dot_general(part, stripe(index), both, preferred_element_type=jnp.float32)

        out[...] = lax.fori_loop(0, columns // LANES, step, jnp.zeros(out.shape, jnp.float32))

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(outputs // tile,),
        in_specs=[
            pl.BlockSpec((1, LANES), lambda i, layer: (0, 0)),
            pl.BlockSpec((rows, 2 * columns), lambda i, layer: (0, 0)),
            pl.BlockSpec((1, tile, columns), lambda i, layer: (layer[0], i, 0)),
            pl.BlockSpec((1, blocks, tile), lambda i, layer: (layer[0], 0, i)),
        ],
        out_specs=pl.BlockSpec((rows, tile), lambda i, layer: (0, i)),
        scratch_shapes=[pltpu.VMEM((tile, _whole_lanes(blocks)), jnp.float32)],
    )
    return pl.pallas_call(
        kernel,
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct((rows, outputs), jnp.float32),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=_VMEM),
        interpret=interpret,
    )(layer.reshape(1), _levels(), x, codes, absmax)


def _stripe(levels, codes, constants, index: Int[Array, ""], *, block_size: int) -> BFloat16[Array, "O 256"]:
    """Returns stripe number `index` of the matrix, from references to levels, codes and constants [O, M]."""
    packed = codes[:, pl.ds(index * LANES, LANES)].astype(jnp.int32)
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)  # one row, as the lanes of all outputs are the same
    high_nibble_first = 4 * (1 - (lane & 1))
    table = jnp.broadcast_to(levels[...], packed.shape)
    halves = []
    for half in range(2):
        code = (_take(packed, (lane >> 1) + half * LANES // 2) >> high_nibble_first) & 15
        first = (index * _STRIPE + half * LANES) >> (block_size.bit_length() - 1)
        window = constants[:, pl.ds((first >> 7) * LANES, LANES)]
        constant = _take(window, (first & (LANES - 1)) + (lane >> (block_size.bit_length() - 1)))
        halves.append((_take(table, code) * constant).astype(jnp.bfloat16))
    return jnp.concatenate(halves, axis=1)


def _levels() -> Float[Array, "1 128"]:
    """Returns the levels, with zeros up to a whole vector."""
    return jnp.pad(jnp.asarray(LEVELS), (0, LANES - len(LEVELS)))[None]


def _take(values: Shaped[Array, "O 128"], lanes: Int[Array, "#O 128"]) -> Shaped[Array, "O 128"]:
    """Gathers along the lanes of each row, from the same lanes in all rows if these are given once."""
    return jnp.take_along_axis(values, jnp.broadcast_to(lanes, values.shape), axis=1, mode="promise_in_bounds")


def _by_output(absmax: Float[Array, "M O"]) -> Float[Array, "O lanes"]:
    """Transposes the constants, with zeros up to a whole number of lanes."""
    blocks, outputs = absmax.shape
    zeros = jnp.zeros((_whole_lanes(blocks) - blocks, outputs), jnp.float32)
    return (jnp.concatenate([absmax, zeros]) if len(zeros) else absmax).T


def _pad(array: Array, multiples: tuple[int, int]) -> Array:
    """Appends zeros up to multiples of two numbers."""
    widths = [(0, -size % multiple) for size, multiple in zip(array.shape, multiples, strict=True)]
    return jnp.pad(array, widths) if any(after for _, after in widths) else array


def _tile(outputs: int, columns: int) -> int:
    """Returns the number of outputs of a step, which divides all: as many lanes as the bytes of their codes allow."""
    tile = LANES
    while outputs % (2 * tile) == 0 and 2 * tile * columns <= _CODES_PER_STEP:
        tile *= 2
    return tile


def _whole_lanes(count: int) -> int:
    return -(-count // LANES) * LANES
