"""Gradients of projections and activations equal those of the plain functions, and save only what they need."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.models.encoder_block import ACTIVATIONS, activate
from paligemma_jax.models.projection import contract

pytestmark = pytest.mark.usefixtures("fast_compilation")


def random(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), dtype)


def plain_product(x, kernel, num_contracted):
    y = jnp.tensordot(x.astype(jnp.float32), kernel.astype(jnp.float32), num_contracted)
    return y


@pytest.mark.parametrize(
    ("x", "kernel", "num_contracted"),
    [((2, 3, 4), (4, 5), 1), ((2, 3, 4), (4, 5, 6), 1), ((2, 3, 4, 5), (4, 5, 6), 2), ((4,), (4, 5), 1)],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_products_and_their_gradients(x, kernel, num_contracted, dtype, tolerance):
    x, kernel = random(*x, dtype=dtype), random(*kernel, dtype=dtype)

    def loss(product):  # its cotangent differs between outputs
        return lambda x, kernel: jnp.sin(product(x, kernel, num_contracted)).sum()

    assert contract(x, kernel, num_contracted).dtype == jnp.float32
    for arguments in (0, 1, (0, 1)):
        got, want = (
            jax.jit(jax.value_and_grad(loss(product), arguments))(x, kernel) for product in (contract, plain_product)
        )
        assert jax.tree.map(lambda a: a.dtype, got) == jax.tree.map(lambda a: a.dtype, want)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(
                np.float32(a), np.float32(b), rtol=tolerance, atol=tolerance * np.abs(np.float32(b)).max()
            ),
            got,
            want,
        )


def test_a_frozen_kernel_needs_no_saved_input():
    x, kernel = random(2, 3, 4), random(4, 5)
    (trained, frozen) = (
        jax.make_jaxpr(lambda x: jax.vjp(lambda *a: contract(*a, 1), x, kernel)[1])(x),
        jax.make_jaxpr(lambda x: jax.vjp(lambda x: contract(x, kernel, 1), x)[1])(x),
    )
    assert (2, 3, 4) in [v.aval.shape for v in trained.jaxpr.outvars]
    assert (2, 3, 4) not in [v.aval.shape for v in frozen.jaxpr.outvars]


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("factor", [None, random(3, 7)])
def test_activations_save_their_arguments_alone(name, factor):
    x, cotangent = 3 * random(3, 7), random(3, 7) + 1

    def plain(x, factor):
        return ACTIVATIONS[name](x) if factor is None else ACTIVATIONS[name](x) * factor

    # The policy of blocks whose weights are gathered saves everything else.
    keep = jax.checkpoint_policies.everything_saveable
    got, gradient = jax.vjp(jax.checkpoint(lambda *a: activate(name, *a), policy=keep), x, factor)
    want, expected = jax.vjp(plain, x, factor)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), gradient(cotangent), expected(cotangent)
    )
    saved = [leaf for leaf in jax.tree.leaves(gradient) if getattr(leaf, "shape", ()) == x.shape]
    assert len(saved) <= (1 if factor is None else 2)
