"""FLOPs of compiled programs against closed forms."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from train_jax.parallel.sharding import make_mesh
from train_jax.plan import hlo
from train_jax.plan.flops import product_flops

X, W = jax.ShapeDtypeStruct((32, 64), jnp.float32), jax.ShapeDtypeStruct((6, 64, 64), jnp.float32)
LAYER = 2 * 32 * 64 * 64


def flops(function, *shapes):
    return product_flops(hlo.parse(jax.jit(function).lower(*shapes).compile().as_text()))


def stack(w, x, remat=False):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, w)[0].sum()


def test_a_scan_counts_every_layer_forward_and_backward():
    assert flops(stack, W, X) == 6 * LAYER
    assert flops(jax.grad(stack), W, X) == 3 * 6 * LAYER  # the layer, and the gradients of its two factors


def test_recomputed_layers_count_again():
    assert flops(jax.grad(lambda w, x: stack(w, x, remat=True)), W, X) == 4 * 6 * LAYER


def test_batched_contractions():
    q, k = jax.ShapeDtypeStruct((2, 5, 3, 7), jnp.float32), jax.ShapeDtypeStruct((2, 11, 3, 7), jnp.float32)
    assert flops(lambda q, k: jnp.einsum("btnh,bsnh->bnts", q, k), q, k) == 2 * 2 * 3 * 5 * 11 * 7


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(groups):
    image, kernel = jax.ShapeDtypeStruct((2, 4, 8, 8), jnp.float32), jax.ShapeDtypeStruct((6, 4 // groups, 2, 2), float)

    def patches(x, w):
        return jax.lax.conv_general_dilated(x, w.astype(x.dtype), (2, 2), "VALID", feature_group_count=groups)

    assert flops(patches, image, kernel) == 2 * (2 * 6 * 4 * 4) * (4 // groups * 2 * 2)


def test_padding_does_not_count():
    """A kernel of 3 on 5 pixels padded to 7: in each direction, 13 of its 15 positions are in the image."""
    image, kernel = jax.ShapeDtypeStruct((2, 4, 5, 5), jnp.float32), jax.ShapeDtypeStruct((6, 4, 3, 3), jnp.float32)
    same = lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME")  # noqa: E731
    assert flops(same, image, kernel) == 2 * 2 * 6 * 4 * 13 * 13


def test_branches_count_the_largest_and_unknown_loops_once():
    assert flops(lambda x: jax.lax.cond(x.sum() > 0, lambda x: x @ x.T, lambda x: (x @ x.T) @ x @ x.T, x), X) == (
        2 * 32 * 32 * 64 * 3
    )
    square = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    assert flops(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x), square) == 2 * 8**3


@pytest.mark.parametrize("spec, share", [(P("data"), 8), (P(), 1)])
def test_a_device_counts_its_own_rows(spec, share):
    """With rows over 8 devices each has an eighth; if every device computes everything, each has all."""
    mesh = make_mesh({"data": 8, "fsdp": 1, "tensor": 1})
    x = jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=NamedSharding(mesh, spec))
    w = jax.ShapeDtypeStruct((64, 64), X.dtype, sharding=NamedSharding(mesh, P()))
    assert flops(lambda x, w: x @ w, x, w) == LAYER // share


def test_products_in_gpu_and_tpu_programs():
    """In the text of the GPU's and the TPU's compiler."""
    text = """\
ENTRY %main (a: bf16[32,64], b: bf16[64,128]) -> f32[32,128] {
  %a = bf16[32,64]{1,0} parameter(0)
  %b = bf16[64,128]{1,0} parameter(1)
  %g = (f32[32,128]{1,0}, s8[4]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_\
backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  ROOT %c = f32[32,128]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}
"""
    assert product_flops(hlo.parse(text)) == 2 * (2 * 32 * 64 * 128)
