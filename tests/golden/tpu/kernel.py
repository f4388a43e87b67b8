"""The program of kernel.hlo: three calls of a Pallas kernel that computes tanh(x @ w), block by block."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

ROWS, INNER, COLUMNS = 16_384, 512, 4096
BLOCK, HALF = 256, INNER // 2


def body(x_ref, w_ref, out_ref):
    def add(half, total):
        part = pl.ds(half * HALF, HALF)
        return total + jnp.dot(x_ref[:, part], w_ref[part, :], preferred_element_type=jnp.float32)

    out_ref[...] = jnp.tanh(jax.lax.fori_loop(0, 2, add, jnp.zeros(out_ref.shape, jnp.float32)))


def layer(x, w):
    """Returns float32 [ROWS, COLUMNS] of x [ROWS, INNER] and w [INNER, COLUMNS] in bfloat16."""
    return pl.pallas_call(
        body,
        grid=(ROWS // BLOCK, COLUMNS // BLOCK),
        in_specs=[
            pl.BlockSpec((BLOCK, INNER), lambda row, column: (row, 0)),
            pl.BlockSpec((INNER, BLOCK), lambda row, column: (0, column)),
        ],
        out_specs=pl.BlockSpec((BLOCK, BLOCK), lambda row, column: (row, column)),
        out_shape=jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32),
        name="layer",
    )(x, w)


def program(x, kernels):
    """Returns the sum of the layers of three kernels [3, INNER, COLUMNS]."""
    return jax.lax.scan(lambda total, w: (total + layer(x, w).sum(), None), jnp.float32(0), kernels)[0]
