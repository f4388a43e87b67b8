"""Token cross entropy against the plain loss: value, gradients, masks, types, memory, sharding."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from paligemma_jax.losses import (
    chunked_cross_entropy,
    loss_weights,
    token_chunks,
    token_cross_entropy,
    token_log_probs,
    token_scores,
)
from paligemma_jax.losses.reference import token_cross_entropy as plain_loss
from paligemma_jax.losses.reference import token_log_probs as plain_log_probs
from train_jax.core.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compilation")

VOCABULARY = 257_152  # PaliGemma's


def make_batch(shape=(3, 7), width=5, vocab=37, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(*shape, width)), dtype)
    embedding = jnp.asarray(rng.normal(size=(vocab, width)), dtype)
    targets = jnp.asarray(rng.integers(0, vocab, shape), jnp.int32)
    weights = jnp.asarray(rng.uniform(0.5, 2.0, shape) * (rng.random(shape) > 0.4), jnp.float32)
    return hidden, embedding, targets, weights


def assert_close(got, want, rtol=2e-5, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


@pytest.mark.parametrize(
    ("chunk_size", "vocab_chunk", "softcap"),
    [
        (4, None, None),  # 21 tokens of 3 rows: 1 of each row per chunk, the last chunks hold padding
        (1000, None, 2.0),  # one chunk
        (8, 10, None),  # 37 tokens: 3 blocks of 10 and one of 7
        (1, 37, 2.0),  # one block
        (2, 10, 2.0),  # fewer tokens than rows
        (4, 64, None),  # a block larger than the vocabulary
    ],
)
def test_value_and_every_gradient_equal_the_plain_loss(chunk_size, vocab_chunk, softcap):
    batch = make_batch()

    def ours(hidden, embedding, weights):  # the factor 3 makes the cotangent of the loss differ from 1
        return 3 * token_cross_entropy(hidden, embedding, batch[2], weights, chunk_size, vocab_chunk, softcap)

    def plain(hidden, embedding, weights):
        return 3 * plain_loss(hidden, embedding, batch[2], weights, softcap)

    arguments = batch[0], batch[1], batch[3]
    got, want = (jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*arguments) for loss in (ours, plain))
    assert_close(got, want)


@pytest.mark.parametrize("shape", [(23,), (6, 1), (2, 3, 4)])
def test_any_leading_shape(shape):
    batch = make_batch(shape)
    got = jax.jit(jax.value_and_grad(lambda *b: token_cross_entropy(*b, chunk_size=4)))(*batch)
    assert_close(got, jax.jit(jax.value_and_grad(plain_loss))(*batch))
    got = jax.jit(lambda *b: token_log_probs(*b, chunk_size=4))(*batch[:3])
    np.testing.assert_allclose(got, plain_log_probs(*batch[:3]), atol=1e-5)


def test_closed_form_of_a_uniform_model():
    loss = token_cross_entropy(jnp.zeros((2, 3, 4)), jnp.ones((50, 4)), jnp.zeros((2, 3), int), jnp.full((2, 3), 0.5))
    assert loss == pytest.approx(3 * math.log(50), rel=1e-6)
    assert loss.dtype == jnp.float32


def test_gradient_of_a_single_argument():
    batch = make_batch()
    expected = jax.jit(jax.grad(plain_loss, (0, 1, 3)))(*batch)
    for argument, want in zip((0, 1, 3), expected, strict=True):
        got = jax.jit(jax.grad(token_cross_entropy, argument), static_argnums=4)(*batch, 8)
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-5)


def test_tokens_of_weight_zero_are_ignored_even_if_nan():
    hidden, embedding, targets, weights = make_batch()
    weights = weights.at[:, :2].set(0.0).at[1].set(0.0)
    want = jax.value_and_grad(plain_loss, (0, 1))(hidden, embedding, targets, weights)
    dirty = jnp.where(weights[..., None] == 0, jnp.nan, hidden)
    ignored = jnp.where(weights == 0, -100, targets)
    for vocab_chunk in (None, 10):
        got = jax.value_and_grad(token_cross_entropy, (0, 1))(dirty, embedding, ignored, weights, 8, vocab_chunk)
        assert_close(got, want)


def test_a_batch_without_any_weight():
    hidden, embedding, targets, weights = make_batch()
    loss, (d_hidden, d_embedding) = jax.value_and_grad(token_cross_entropy, (0, 1))(
        hidden, embedding, targets, weights * 0
    )
    assert loss == 0 and not d_hidden.any() and not d_embedding.any()


@pytest.mark.parametrize(
    ("dtype", "tolerance", "vocab_chunk"),
    [(jnp.bfloat16, 2e-2, None), (jnp.bfloat16, 2e-2, 100), (jnp.float16, 2e-3, 100)],
)
def test_half_precision_accumulates_in_float32(dtype, tolerance, vocab_chunk):
    batch = make_batch((2, 9), width=64, vocab=333, dtype=dtype)
    got, d_got = jax.jit(jax.value_and_grad(lambda *b: token_cross_entropy(*b, 4, vocab_chunk), (0, 1)))(*batch)
    want, d_want = jax.jit(jax.value_and_grad(plain_loss, (0, 1)))(*batch)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5)  # products of half-precision numbers are exact in float32
    for a, b in zip(d_got, d_want, strict=True):
        assert a.dtype == dtype
        error = jnp.linalg.norm((a - b).astype(jnp.float32)) / jnp.linalg.norm(b.astype(jnp.float32))
        assert error < tolerance


def test_float16_keeps_gradients_that_a_loss_scale_can_save():
    """Each wrong token has probability 3e-10, which float16 cannot represent; their sum must reach the hidden state."""
    width, vocab = 4, 2000
    embedding = jnp.zeros((vocab, width), jnp.float16).at[0, 0].set(22.0).at[1:, 1].set(1.0)
    hidden = jnp.zeros((1, 1, width), jnp.float16).at[..., 0].set(1.0)
    targets, weights = jnp.zeros((1, 1), int), jnp.full((1, 1), 1e-3)
    scale = 2.0**20
    d_hidden = jax.grad(lambda h: scale * token_cross_entropy(h, embedding, targets, weights))(hidden)
    wrong = (vocab - 1) * math.exp(-22.0) / (1 + (vocab - 1) * math.exp(-22.0))
    np.testing.assert_allclose(d_hidden[0, 0, 1], scale * 1e-3 * wrong, rtol=0.05)


def test_scores():
    hidden, embedding, targets, _ = make_batch()
    logits = jnp.einsum("btd,vd->btv", hidden, embedding)
    targets = targets.at[0].set(logits[0].argmax(-1))
    for vocab_chunk in (None, 10):
        scores = token_scores(hidden, embedding, targets, 4, vocab_chunk, softcap=30.0)
        want = plain_log_probs(hidden, embedding, targets, softcap=30.0)
        np.testing.assert_allclose(scores.log_probs, want, atol=1e-5)
        np.testing.assert_array_equal(scores.correct, logits.argmax(-1) == targets)
        assert scores.log_probs.dtype == jnp.float32


@pytest.mark.parametrize("vocab_chunk", [None, 10])
def test_scores_of_tokens_that_count(vocab_chunk):
    hidden, embedding, targets, weights = make_batch()
    counts = weights != 0
    dirty = jnp.where(counts[..., None], hidden, jnp.nan)
    scores = jax.jit(chunked_cross_entropy.counted_scores, static_argnums=(4, 5))(
        dirty, embedding, targets, counts, 4, vocab_chunk
    )
    want = token_scores(hidden, embedding, targets, 4, vocab_chunk)
    np.testing.assert_allclose(scores.log_probs, jnp.where(counts, want.log_probs, 0.0), atol=1e-6)
    np.testing.assert_array_equal(scores.correct, want.correct & counts)


@pytest.mark.parametrize(
    ("shape", "chunk_size", "groups"),
    [((3, 7), 8, 3), ((6, 5), 4, 3), ((4,), 100, 4), ((2, 3, 4), 1, 1), ((5, 2), 3, 1)],
)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_tokens_that_count_fill_the_first_chunks(shape, chunk_size, groups, share):
    counts = np.random.default_rng(0).random(shape) < share
    chunks = token_chunks.chunks_of(shape, chunk_size, jnp.asarray(counts))
    orders = np.asarray(chunks.order)
    assert len(orders) == groups and groups * orders.shape[2] <= chunk_size
    tokens = math.prod(shape) // groups
    for order, counted in zip(orders.reshape(groups, -1), counts.reshape(groups, -1), strict=True):
        np.testing.assert_array_equal(np.sort(order)[:tokens], np.arange(tokens))  # every token once, then padding
        np.testing.assert_array_equal(counted[order[: counted.sum()]], True)
    assert chunks.used == math.ceil(counts.reshape(groups, -1).sum(1).max() / orders.shape[2])
    array = jnp.arange(math.prod(shape) * 2).reshape(*shape, 2)
    copy = jnp.zeros_like(array)
    for chunk in range(orders.shape[1]):
        copy = chunks.update(copy, chunk, chunks.slice(array, chunk))
    np.testing.assert_array_equal(copy, array)


def test_a_loss_of_few_tokens_projects_one_chunk(monkeypatch):
    """The loop's length follows the number of supervised tokens, whatever the positions."""
    projected = []
    project = chunked_cross_entropy.project

    def counting(hidden, *arguments):
        jax.debug.callback(lambda: projected.append(len(hidden)))
        return project(hidden, *arguments)

    monkeypatch.setattr(chunked_cross_entropy, "project", counting)
    hidden, embedding, targets, weights = make_batch((2, 64))
    for last, chunks in ((1, 1), (4, 1), (5, 2), (64, 16)):  # 4 tokens of each row in a chunk
        weights = jnp.ones((2, 64)).at[:, : 64 - last].set(0.0)
        jax.block_until_ready(
            jax.jit(jax.grad(lambda h, w: token_cross_entropy(h, embedding, targets, w, 8)))(hidden, weights)
        )
        jax.effects_barrier()
        assert projected == [8] * chunks
        projected.clear()


def test_vmap_and_the_gradient_of_a_scan():
    batches = [make_batch(seed=seed) for seed in range(3)]
    embedding = batches[0][1]
    hidden, targets, weights = (jnp.stack([batch[i] for batch in batches]) for i in (0, 2, 3))
    want = jnp.stack([plain_loss(hidden[i], embedding, targets[i], weights[i]) for i in range(3)])
    mapped = jax.jit(jax.vmap(lambda h, t, w: token_cross_entropy(h, embedding, t, w, 8)))
    np.testing.assert_allclose(mapped(hidden, targets, weights), want, rtol=1e-5)

    def micro_batches(embedding):  # gradient accumulation
        def add(total, batch):
            return total + token_cross_entropy(batch[0], embedding, *batch[1:], 8), None

        return jax.lax.scan(add, jnp.zeros(()), (hidden, targets, weights))[0]

    def whole(embedding):
        return plain_loss(hidden, embedding, targets, weights)

    got, want = (jax.jit(jax.value_and_grad(loss))(embedding) for loss in (micro_batches, whole))
    assert_close(got, want)


def test_loss_weights():
    mask = jnp.array([[0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]])
    weights, tokens = loss_weights(mask, "token_mean")
    np.testing.assert_array_equal(weights, mask)
    assert tokens == 4
    weights, rows = loss_weights(mask, "example_mean")
    third = 1 / 3
    np.testing.assert_allclose(weights, [[0, third, third, third], [0, 0, 0, 1], [0, 0, 0, 0]], rtol=1e-6)
    assert rows == 2


# ---- memory ---------------------------------------------------------------------------------------------------------


def abstract_batch(vocab, dtype, shape=(2, 256), width=64):
    s = jax.ShapeDtypeStruct
    return s((*shape, width), dtype), s((vocab, width), dtype), s(shape, jnp.int32), s(shape, jnp.float32)


def temp_bytes(function, vocab, dtype=jnp.float32):
    return jax.jit(function).lower(*abstract_batch(vocab, dtype)).compile().memory_analysis().temp_size_in_bytes


def training(vocab_chunk):
    """Frozen embedding: value and gradient of the hidden states alone."""
    return jax.value_and_grad(lambda h, e, t, w: token_cross_entropy(h, e, t, w, 256, vocab_chunk))


def evaluation(vocab_chunk):
    return lambda h, e, t, w: token_scores(h, e, t, 256, vocab_chunk)


@pytest.mark.parametrize("step", [training, evaluation])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_compiled_memory_holds_one_chunk_of_logits(step, dtype):
    growth = temp_bytes(step(None), VOCABULARY, dtype) - temp_bytes(step(None), 1024, dtype)
    assert 0 < growth <= 1.5 * 256 * VOCABULARY * 4


@pytest.mark.parametrize("step", [training, evaluation])
def test_compiled_memory_is_flat_in_the_vocabulary_with_vocabulary_chunks(step):
    """31 blocks and a remainder against 2 blocks and the same remainder: nothing grows."""
    assert temp_bytes(step(8192), VOCABULARY) == temp_bytes(step(8192), VOCABULARY - 29 * 8192)


def shapes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, (tuple, list)) else [parameter]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from shapes(inner)


def rematerialised(*batch):
    return jax.checkpoint(token_cross_entropy)(*batch)


def scanned(hidden, *others):
    """Two micro-batches that share targets and weights: partial evaluation may move their part out of the scan."""
    return jax.lax.scan(lambda total, h: (total + token_cross_entropy(h, *others), None), 0.0, hidden)[0]


@pytest.mark.parametrize("loss", [token_cross_entropy, rematerialised, scanned])
def test_frozen_embeddings_get_no_gradient_and_logits_of_the_batch_never_exist(loss):
    batch = list(abstract_batch(vocab=1000, dtype=jnp.float32))
    if loss is scanned:
        batch[0] = jax.ShapeDtypeStruct((2, *batch[0].shape), jnp.float32)
    frozen = set(shapes(jax.make_jaxpr(jax.grad(loss))(*batch).jaxpr))
    trained = set(shapes(jax.make_jaxpr(jax.grad(loss, 1))(*batch).jaxpr))
    assert (1000, 64) not in frozen and (1000, 64) in trained
    for seen in (frozen, trained):  # one chunk of logits is there
        assert (256, 1000) in seen
        assert max(math.prod(shape) for shape in seen if 1000 in shape) == 256 * 1000


# ---- sharding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "chunk_size", "vocab_chunk"),
    [
        (P("tensor", None), 16, None),  # two tokens of every row
        (P(None, "fsdp"), 3, None),  # fewer tokens than rows
        (P(("fsdp", "tensor"), None), 16, 24),
    ],
)
def test_sharded_equals_one_device(table, chunk_size, vocab_chunk):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    hidden, embedding, targets, weights = make_batch((8, 5), width=6, vocab=64)
    want = jax.value_and_grad(plain_loss, (0, 1))(hidden, embedding, targets, weights)
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    sharded = [
        jax.device_put(array, NamedSharding(mesh, table) if array is embedding else rows)
        for array in (hidden, embedding, targets, weights)
    ]
    step = jax.jit(jax.value_and_grad(lambda *b: token_cross_entropy(*b, chunk_size, vocab_chunk), (0, 1)))
    assert_close(step(*sharded), want)
    log_probs = jax.jit(lambda *b: token_log_probs(*b, chunk_size, vocab_chunk))(*sharded[:3])
    np.testing.assert_allclose(log_probs, plain_log_probs(hidden, embedding, targets), atol=1e-5)


def test_rows_stay_on_their_devices():
    """Data parallel with a frozen embedding: nothing but the scalar loss and number of chunks crosses devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    step = jax.jit(training(None), in_shardings=(rows, everywhere, rows, rows), out_shardings=(everywhere, rows))
    text = step.lower(*abstract_batch(1000, jnp.float32, shape=(16, 64))).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text and "collective-permute" not in text
    assert "all-reduce" in text


def test_hidden_states_beyond_float16_saturate_as_in_generation():
    """A finite residual of 1e5 is no fault: the loss is that of the largest float16; an infinite one stays infinite."""
    hidden, embedding, targets, weights = make_batch(dtype=jnp.float32)
    embedding = (0.01 * embedding).astype(jnp.float16)
    large = hidden.at[..., 0].set(1e5)
    clipped = hidden.at[..., 0].set(65504.0).astype(jnp.float16)
    result, expected = (jax.jit(token_cross_entropy)(h, embedding, targets, weights) for h in (large, clipped))
    assert np.isfinite(result) and result == expected
    np.testing.assert_array_equal(*(token_scores(h, embedding, targets).log_probs for h in (large, clipped)))
    fault = hidden.at[0, :, 0].set(jnp.inf)
    assert not np.isfinite(token_cross_entropy(fault, embedding, targets, jnp.ones_like(weights)))


@pytest.mark.parametrize("sizes", [{"chunk_size": 0}, {"chunk_size": -1}, {"vocab_chunk": 0}])
def test_chunk_sizes_below_one_are_refused(sizes):
    batch = make_batch()
    ((name, size),) = sizes.items()
    for call in (lambda: token_cross_entropy(*batch, **sizes), lambda: token_log_probs(*batch[:3], **sizes)):
        with pytest.raises(UserError, match=f"the loss has {name}={size}, expected 1 or more"):
            call()
