"""FLOPs of matrix products against closed forms."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from train_jax.flops import product_flops
from train_jax.sharding import make_mesh

X, W = jax.ShapeDtypeStruct((32, 64), jnp.float32), jax.ShapeDtypeStruct((6, 64, 64), jnp.float32)
LAYER = 2 * 32 * 64 * 64


def flops(function, *shapes):
    return product_flops(jax.jit(function).trace(*shapes).jaxpr)


def stack(w, x, remat=False):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, w)[0].sum()


def test_a_stack_counts_every_layer_forwards_and_backwards():
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


def test_of_branches_the_largest_and_of_unknown_loops_one_pass():
    assert flops(lambda x: jax.lax.cond(x.sum() > 0, lambda x: x @ x.T, lambda x: (x @ x.T) @ x @ x.T, x), X) == (
        2 * 32 * 32 * 64 * 3
    )
    square = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    assert flops(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x), square) == 2 * 8**3


def test_mapped_over_devices_counts_all_of_them():
    mesh = make_mesh({"data": 8, "fsdp": 1, "tensor": 1})
    mapped = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert flops(mapped, X) == 8 * 2 * 4 * 4 * 64
