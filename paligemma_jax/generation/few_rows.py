"""Products of few rows with large matrices on TPUs, at the bandwidth of the memory.

XLA multiplies fewer than eight rows without the matrix unit, and copies a layer's matrix out of its stack before a
Pallas kernel. These kernels read one layer of a stack where it is, in blocks of some MiB.

Axes: L layers, N rows, I inputs, O outputs.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, BFloat16, Float, Int, Shaped

MOST_ROWS = 64  # with more, the kernels' whole output blocks leave no room for the matrix, and XLA's product is as fast
SUBLANES = 16  # rows of a bfloat16 vector
LANES = 128
_LARGEST_TILE = 2048
_BLOCK = 4 << 20  # bytes of a matrix that a step of the kernel holds, twice
_VMEM = 64 << 20


def supports(inputs: int, outputs: int) -> bool:
    """Returns whether the kernels multiply with matrices of these sizes, whichever axis is first."""
    return inputs % LANES == 0 and outputs % LANES == 0


@functools.partial(jax.jit, static_argnames=("transposed", "interpret"))
def product(
    x: BFloat16[Array, "N I"],
    stack: Shaped[Array, "L rows columns"],
    layer: Int[Array, ""],
    *,
    transposed: bool = False,
    interpret: bool = False,
) -> Float[Array, "N O"]:
    """Returns x W, or x W^T, for the matrix W of one layer, accumulated in float32.

    Args:
      x: N a multiple of SUBLANES.
      stack: matrices [I, O], or [O, I] if `transposed`, in bfloat16 or int8; `supports` says for which sizes. The
        outputs of a transposed matrix need not be a multiple of the lanes.
      layer: its number.
      transposed: whether the inputs are the last axis.
    """
    inputs, outputs = stack.shape[:0:-1] if transposed else stack.shape[1:]
    tile_in = _divisor(inputs, _LARGEST_TILE)
    most = _BLOCK // (tile_in * stack.dtype.itemsize)
    tile_out = _divisor(outputs, most) if outputs % LANES == 0 else most
    contracted = (((1,), (1 if transposed else 0,)), ((), ()))

    def kernel(_, x, matrix, out):
        @pl.when(pl.program_id(1) == 0)
        def _():
            out[...] = jnp.zeros(out.shape, jnp.float32)

        weights = matrix[0].astype(jnp.bfloat16)
        out[...] += lax.dot_general(x[...], weights, contracted, preferred_element_type=jnp.float32)

    if transposed:
        block = pl.BlockSpec((1, tile_out, tile_in), lambda o, i, layer: (layer[0], o, i))
    else:
        block = pl.BlockSpec((1, tile_in, tile_out), lambda o, i, layer: (layer[0], i, o))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(pl.cdiv(outputs, tile_out), inputs // tile_in),
        in_specs=[pl.BlockSpec((len(x), tile_in), lambda o, i, layer: (0, i)), block],
        out_specs=pl.BlockSpec((len(x), tile_out), lambda o, i, layer: (0, o)),
    )
    return pl.pallas_call(
        kernel,
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct((len(x), outputs), jnp.float32),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=_VMEM),
        interpret=interpret,
    )(layer.reshape(1), x, stack)


def padded(x: Shaped[Array, "N I"]) -> Shaped[Array, "M I"]:
    """Appends rows of zeros up to a multiple of SUBLANES."""
    return jnp.pad(x, ((0, -len(x) % SUBLANES), (0, 0)))


def _divisor(size: int, most: int) -> int:
    """Returns the largest power of two times the lanes, at most `most`, that divides a multiple of the lanes."""
    tile = LANES
    while size % (2 * tile) == 0 and 2 * tile <= most:
        tile *= 2
    return tile
