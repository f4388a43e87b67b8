"""The token divergence against the plain one: value, gradient, masks, types, memory, sharding."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from paligemma_jax.losses.chunked_kl import token_divergence
from paligemma_jax.losses.reference import token_divergence as plain
from tests.paligemma_jax.losses.test_chunked_cross_entropy import shapes
from train_jax.core.errors import UserError
from train_jax.parallel.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("fast_compilation")


def make_batch(shape=(3, 7), width=5, vocab=37, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    hidden, frozen = (jnp.asarray(rng.normal(size=(*shape, width)), dtype) for _ in range(2))
    embedding = jnp.asarray(rng.normal(size=(vocab, width)), dtype)
    weights = jnp.asarray(rng.uniform(0.5, 2.0, shape) * (rng.random(shape) > 0.4), jnp.float32)
    return hidden, frozen, embedding, weights


@pytest.mark.parametrize(
    ("temperature", "chunk_size", "vocab_chunk", "softcap"),
    [
        (1.0, 24, None, None),  # 21 tokens of 3 rows: chunks of 6, the last one holds padding
        (2.0, 1000, None, 2.0),  # one chunk
        (0.5, 16, 10, 2.0),  # a vocabulary of 37: 3 blocks of 10 and one of 7
        (2.0, 1, 64, None),  # a token at a time, a block larger than the vocabulary
    ],
)
def test_value_and_gradient_equal_the_plain_divergence(temperature, chunk_size, vocab_chunk, softcap):
    hidden, *others = make_batch()

    def ours(hidden):  # the factor 3 makes the cotangent differ from 1
        return 3 * token_divergence(hidden, *others, temperature, chunk_size, vocab_chunk, softcap)

    got, want = (
        jax.jit(jax.value_and_grad(loss))(hidden)
        for loss in (ours, lambda hidden: 3 * plain(hidden, *others, temperature, softcap))
    )
    np.testing.assert_allclose(got[0], want[0], rtol=2e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=2e-5, atol=1e-5)


def test_divergence_is_zero_for_equal_states_alone():
    hidden, frozen, embedding, weights = make_batch()
    measure = jax.jit(jax.value_and_grad(lambda *batch: token_divergence(*batch, vocab_chunk=10)))
    same, gradient = measure(hidden, hidden, embedding, weights)
    assert same == 0 and not gradient.any()
    for token in np.argwhere(weights)[:3]:
        assert measure(hidden, frozen, embedding, jnp.zeros_like(weights).at[tuple(token)].set(1.0))[0] > 0


def test_closed_form_of_two_words():
    """For a confident and a uniform model, in this direction: log 2 minus the entropy of the confident one."""
    embedding, states = jnp.array([[1.0], [0.0]]), jnp.array([[0.0], [math.log(3)]])
    p = 0.75
    expected = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    value = jax.jit(token_divergence)(states[:1], states[1:], embedding, jnp.array([2.0]))
    assert value == pytest.approx(2 * expected, rel=1e-5) and value.dtype == jnp.float32


def test_the_gradient_reaches_the_tuned_states_alone():
    gradients = jax.jit(jax.grad(token_divergence, (0, 1, 2, 3)))(*make_batch())
    assert gradients[0].any() and not any(gradient.any() for gradient in gradients[1:])


def test_tokens_of_weight_zero_are_ignored_even_if_nan():
    hidden, frozen, embedding, weights = make_batch()
    weights = weights.at[:, :2].set(0.0).at[1].set(0.0)
    want = jax.jit(jax.value_and_grad(plain))(hidden, frozen, embedding, weights)
    dirty, worse = (jnp.where(weights[..., None] == 0, jnp.nan, states) for states in (hidden, frozen))
    for chunk in (None, 10):
        measure = jax.jit(jax.value_and_grad(token_divergence), static_argnums=(4, 5, 6))
        got = measure(dirty, worse, embedding, weights, 1.0, 8, chunk)
        np.testing.assert_allclose(got[0], want[0], rtol=2e-5)
        np.testing.assert_allclose(got[1], want[1], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 2e-2), (jnp.float16, 2e-3)])
def test_half_precision_accumulates_in_float32(dtype, tolerance):
    batch = make_batch((2, 9), width=64, vocab=333, dtype=dtype)
    got, d_got = jax.jit(jax.value_and_grad(lambda *b: token_divergence(*b, chunk_size=4)))(*batch)
    want, d_want = jax.jit(jax.value_and_grad(plain))(*batch)
    assert got.dtype == jnp.float32 and d_got.dtype == dtype
    np.testing.assert_allclose(got, want, rtol=1e-5)  # products of half-precision numbers are exact in float32
    error = jnp.linalg.norm((d_got - d_want).astype(jnp.float32)) / jnp.linalg.norm(d_want.astype(jnp.float32))
    assert error < tolerance


def test_logits_of_the_batch_never_exist():
    s = jax.ShapeDtypeStruct
    states = s((2, 256, 64), jnp.float32)
    batch = states, states, s((1000, 64), jnp.float32), s((2, 256), jnp.float32)
    seen = set(shapes(jax.make_jaxpr(jax.grad(token_divergence))(*batch).jaxpr))
    assert (64, 1000) in seen  # a quarter of the tokens of a chunk
    assert max(math.prod(shape) for shape in seen if 1000 in shape) == 64 * 1000


def test_sharded_equals_one_device():
    hidden, frozen, embedding, weights = make_batch((8, 6), vocab=32, width=8)
    want = jax.jit(jax.value_and_grad(plain))(hidden, frozen, embedding, weights, 2.0)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    states = jax.device_put((hidden, frozen), rows)
    table, weights = jax.device_put(embedding, NamedSharding(mesh, P("tensor"))), jax.device_put(weights, rows)
    got = jax.jit(jax.value_and_grad(token_divergence), static_argnums=(4, 5))(*states, table, weights, 2.0, 16)
    np.testing.assert_allclose(got[0], want[0], rtol=2e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"temperature": 0.0}, "the divergence has temperature=0.0, expected a positive number: change it."),
        ({"chunk_size": 0}, "the loss has chunk_size=0, expected 1 or more: change it."),
        ({"vocab_chunk": 0}, "the loss has vocab_chunk=0, expected 1 or more: change it."),
    ],
)
def test_user_errors(changes, sentence):
    with pytest.raises(UserError) as error:
        token_divergence(*make_batch(), **changes)
    assert str(error.value) == sentence
