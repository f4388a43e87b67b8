"""Quantised kernels inside a projection: parity with bitsandbytes' Linear4bit and with the dequantised kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paligemma_jax.adapt.quantization import nf4
from paligemma_jax.adapt.quantization.quantize import quantize_array, quantized_shapes
from paligemma_jax.adapt.quantization.quantized_kernel import QuantizedKernel, make_codec
from paligemma_jax.models.projection import Projection

pytestmark = pytest.mark.usefixtures("fast_compilation")

CODECS = [("nf4", 64, False), ("nf4", 128, True), ("int8", 64, False), ("int4", 64, False)]


def projection(in_shape, out_shape, seed=0, **options):
    """A projection with a random kernel."""
    layer = Projection("test", in_shape, out_shape, rngs=nnx.Rngs(0), **options)
    kernel = np.random.default_rng(seed).standard_normal((*in_shape, *out_shape))
    layer.kernel[...] = jnp.asarray(kernel, layer.kernel.dtype)
    return layer


def quantized(layer, kind, block_size=64, double=False):
    """The projection with its kernel quantised."""
    layer = nnx.clone(layer)
    codec = make_codec(kind, block_size, double)
    layer.kernel = QuantizedKernel.of(layer.kernel[...], codec, layer.in_shape, layer.out_shape)
    return layer


@pytest.mark.parametrize("name, suffix", [("plain", ""), ("dq", "@nearest")])
def test_a_projection_equals_linear4bit(golden, name, suffix):
    stored = np.load(golden / "bnb_quant/bases.npz")
    layer = Projection("test", (128,), (96,), use_bias=True, rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.asarray(stored["linear4/W"].T)
    layer.bias[...] = jnp.asarray(stored["linear4/b"])
    layer = quantized(layer, "nf4", double=name == "dq")
    np.testing.assert_array_equal(layer.kernel.codes[...].reshape(-1), stored["linear4/plain/packed"])
    kernel = layer.kernel.dequantize()
    np.testing.assert_allclose(kernel.T, stored[f"linear4/{name}/W_dequant{suffix}"], rtol=1e-6, atol=1e-7)
    x = jnp.asarray(stored["linear4/x"])
    np.testing.assert_allclose(layer(x), stored[f"linear4/{name}/y{suffix}"], rtol=0, atol=1e-5)
    dx = jax.grad(lambda x: jnp.square(layer(x)).sum())(x)
    np.testing.assert_allclose(dx, stored[f"linear4/{name}/dx_of_sum_y2{suffix}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind, block_size, double", CODECS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_product_and_gradient_equal_those_of_the_dequantised_kernel(kind, block_size, double, dtype):
    plain = projection((4, 6), (3, 5), dtype=dtype)
    layer = quantized(plain, kind, block_size, double)
    assert layer.kernel.shape == plain.kernel.shape and layer.kernel.size == 360
    plain.kernel[...] = layer.kernel.dequantize()
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 7, 4, 6)), dtype)

    def both(layer):
        y, pull = jax.vjp(lambda x: layer(x, out_dtype=jnp.float32), x)
        return y, pull(jnp.cos(y))[0].astype(jnp.float32)

    atol = 2e-5 if dtype == "float32" else 2e-2  # bfloat16: sums of few rounded products, in another order
    for got, expected in zip(both(layer), both(plain), strict=True):
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=0, atol=atol * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("in_shape, out_shape", [((128,), (3, 4)), ((3, 24), (16,)), ((4304,), (4,)), ((51,), (37,))])
def test_blocks_lie_as_in_torch_s_weight(in_shape, out_shape):
    """Also where blocks cross rows: the bytes in order are those of the flat [out, in] matrix."""
    kernel = np.random.default_rng(2).standard_normal((*in_shape, *out_shape)).astype(np.float32)
    weight = kernel.reshape(np.prod(in_shape), -1).T
    codes, absmax = nf4.quantize(weight)
    arrays = quantize_array("nf4", kernel, len(in_shape))
    np.testing.assert_array_equal(arrays["codes"].reshape(-1), codes)
    np.testing.assert_array_equal(arrays["absmax"].reshape(-1), absmax)


@pytest.mark.parametrize("kind, block_size, double", CODECS)
def test_shapes_are_known_beforehand(kind, block_size, double):
    kernel = np.random.default_rng(3).standard_normal((8, 9, 16)).astype(np.float32)
    arrays = quantize_array(kind, kernel, 2, block_size, double)
    shapes = quantized_shapes(kind, kernel.shape, 2, block_size, double)
    assert {name: (a.shape, a.dtype) for name, a in arrays.items()} == {
        name: (s.shape, s.dtype) for name, s in shapes.items()
    }


def test_no_gradient_reaches_the_stored_arrays():
    graph, state = nnx.split(quantized(projection((64,), (8,)), "nf4").kernel)
    x = jnp.ones((1, 64))

    def loss(absmax):
        return nnx.merge(graph, state | {"absmax": state["absmax"].replace(absmax)}).contract(x).sum()

    assert not np.asarray(jax.grad(loss)(state["absmax"][...])).any()
