"""The Pallas kernels for NF4, in interpret mode, against the plain codec."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.adapt.quantization import nf4_tpu
from paligemma_jax.adapt.quantization.nf4 import NF4


def encoded(shape, block_size=64):
    return NF4(block_size).encode(jax.random.normal(jax.random.key(0), shape))


@pytest.mark.parametrize(
    ("shape", "block_size"),
    [((128, 256), 64), ((40, 192), 64), ((12, 208), 64), ((128, 256), 128)],
    ids=["whole tiles", "short tiles", "groups of rows", "blocks of 128"],
)
def test_dequantized_matrices_are_those_of_the_codec_bit_for_bit(shape, block_size):
    arrays = encoded(shape, block_size)
    groups = nf4_tpu.dequantize(arrays["codes"], arrays["absmax"], block_size=block_size, interpret=True)
    want = NF4(block_size).decode(arrays, shape).astype(jnp.bfloat16)
    np.testing.assert_array_equal(groups.reshape(shape), want)


def test_product_with_one_layer_of_a_stack():
    layers = [encoded((128, 512)), encoded((128, 512))]
    layers[1] = jax.tree.map(lambda array: array[::-1], layers[1])
    x = jax.random.normal(jax.random.key(1), (16, 512), jnp.bfloat16)
    codes, absmax = (jnp.stack([layer[name] for layer in layers]) for name in ("codes", "absmax"))
    assert nf4_tpu.supports_product(codes.shape, 128, 64)
    got = nf4_tpu.product(x, codes, absmax.swapaxes(1, 2), jnp.int32(1), interpret=True)
    matrix = NF4().decode(layers[1], (128, 512)).astype(jnp.bfloat16)
    want = np.asarray(x, np.float32) @ np.asarray(matrix, np.float32).T
    np.testing.assert_allclose(got, want, atol=2e-5)
