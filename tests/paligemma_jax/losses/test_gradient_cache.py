"""Embedding in micro-batches: the direct gradient, for the memory of one micro-batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from paligemma_jax.losses import embed_in_micro_batches, sigmoid_loss, softmax_loss
from paligemma_jax.models.dual_encoder import DualEncoder
from paligemma_jax.models.variants import variant
from tests.paligemma_jax.contrastive import mesh_of
from train_jax.core.errors import UserError
from train_jax.plan import flops, hlo
from train_jax.system.memory import step_memory

pytestmark = pytest.mark.usefixtures("fast_compilation")


def tower(kernels, rows, keys):
    """A residual network with dropout; unit rows."""
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 0.8, rows.shape[1:]))(keys)
    for kernel in kernels:
        rows = rows + jnp.where(keep, jnp.tanh(rows @ kernel), 0.0)
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


def make_params(width=8, depth=3):
    kernels = jax.random.normal(jax.random.key(1), (2, depth, width, width)) / width**0.5
    return {"img": kernels[0], "txt": kernels[1], "log_scale": jnp.float32(1.0), "bias": jnp.float32(-3.0)}


def make_inputs(batch, width=8):
    rows = jax.random.normal(jax.random.key(0), (2, batch, width))
    return {"image": rows[0], "text": rows[1], "key": jax.random.split(jax.random.key(2), batch)}


def loss_of(params, batch, micro_batch, mesh=None):
    def embed(batch):
        return tower(params["img"], batch["image"], batch["key"]), tower(params["txt"], batch["text"], batch["key"])

    zimg, ztxt = embed_in_micro_batches(embed, batch, micro_batch)
    sigmoid = sigmoid_loss(zimg, ztxt, params["log_scale"], params["bias"], mesh=mesh, chunk_size=8)
    return sigmoid + softmax_loss(zimg, ztxt, params["log_scale"], mesh=mesh, chunk_size=8)


@pytest.mark.parametrize("micro_batch", [1, 4, 24])
def test_gradients_equal_the_direct_ones(micro_batch):
    params, batch = make_params(), make_inputs(24)
    step = jax.jit(jax.value_and_grad(loss_of), static_argnums=2)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6),
        step(params, batch, micro_batch),
        step(params, batch, None),
    )


def test_rows_keep_their_order():
    rows = jnp.arange(12.0)[:, None]
    result = embed_in_micro_batches(lambda rows: {"double": 2 * rows}, rows, 4)
    np.testing.assert_array_equal(result["double"], 2 * rows)


def test_memory_is_that_of_a_micro_batch():
    params = jax.eval_shape(lambda: make_params(64, 8))
    batch = jax.eval_shape(lambda: make_inputs(2048, 64))

    def temporary(micro_batch):
        step = jax.jit(jax.grad(loss_of), static_argnums=2)
        return step_memory(step.lower(params, batch, micro_batch).compile()).temp

    assert temporary(64) < temporary(None) / 4


def test_no_product_is_computed_more_than_twice_forward():
    """A step takes both forward passes and a backward pass of twice that; with remat="block" a third forward pass."""
    sizes = {"depth": 3, "mlp_dim": 64, "width": 32, "num_heads": 2}
    config = variant("mini").replace(
        vision={"image_size": 8, "patch_size": 2} | sizes, text={"length": 16} | sizes, embed_dim=32
    )
    rows = jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((4, 16), jnp.int32)

    def forward_passes(remat):
        """Returns the FLOPs of a step over those of embedding once."""
        model = nnx.eval_shape(lambda: DualEncoder(config.replace(both={"remat": remat}), rngs=nnx.Rngs(0)))
        graph, arrays = nnx.split(model)

        def embed(arrays, rows, micro_batch=None):
            return embed_in_micro_batches(lambda rows: nnx.merge(graph, arrays)(*rows)[:2], rows, micro_batch)

        def step(arrays, rows):
            return jax.value_and_grad(lambda arrays: jnp.multiply(*embed(arrays, rows, 2)).sum())(arrays)

        programs = (jax.jit(one).lower(arrays, rows).compile().as_text() for one in (step, embed))
        whole, once = (flops.product_flops(hlo.parse(text)) for text in programs)
        return whole / once

    assert 3.6 < forward_passes("dots") < 4.3
    assert forward_passes("block") > 4.6


def test_every_device_embeds_its_own_rows():
    mesh = mesh_of(8)
    rows = NamedSharding(mesh, P("data"))
    params, batch = make_params(), jax.device_put(make_inputs(64), rows)
    step = jax.jit(jax.value_and_grad(lambda params, batch: loss_of(params, batch, 16, mesh)))
    moved = hlo.collective_bytes(hlo.parse(step.lower(params, batch).compile().as_text()))
    assert set(moved) == {"collective-permute", "all-reduce"}
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6),
        step(params, batch),
        jax.jit(jax.value_and_grad(loss_of), static_argnums=2)(params, make_inputs(64), None),
    )


@pytest.mark.parametrize("micro_batch", [0, 5, 48])
def test_micro_batches_divide_the_batch(micro_batch):
    with pytest.raises(UserError, match=f"batch_size=24 does not divide into embeddings of {micro_batch} rows"):
        embed_in_micro_batches(lambda rows: rows, jnp.ones((24, 1)), micro_batch)
