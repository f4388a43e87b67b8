"""Token cross entropy over a large vocabulary, without the `[B, T, V]` array of logits.

PaliGemma's vocabulary has 257,152 tokens: the float32 logits of one row of 320 text positions take 330 MB, and a
training step holds several copies. Here the vocabulary projection is part of the loss. A loop processes `chunk_size`
tokens at a time: it computes the logits, the loss and, if needed, the gradients of a chunk together and drops the
logits. The backward pass only multiplies by the cotangent of the scalar loss. Few tokens of a row are supervised: the
loop gathers these, and its length, not the shape of a chunk, depends on their number. With `vocab_chunk` the
log-sum-exp is streamed over the vocabulary too, and the logits of a block are computed twice.

Axes: B rows, T positions, D model width, V vocabulary; K chunks of N tokens each (token_chunks.py), v entries of a
block of the vocabulary (vocab_projection.py).

The weights of `loss_weights` determine the reduction: `token_cross_entropy(..., weights) / normalizer`. Under gradient
accumulation and over devices, both terms are summed before they are divided.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from paligemma_jax.losses import token_chunks
from paligemma_jax.losses.vocab_projection import (
    fold_blocks,
    logit_gradient,
    logit_statistics,
    project,
    project_back,
    streamed_statistics,
)
from paligemma_jax.models.numerics import cast
from train_jax.core import row_sharding


class TokenScores(NamedTuple):
    """Log-probability and correctness of every target token."""

    log_probs: Float[Array, "*batch"]  # natural log of the model's probability of the target, float32
    correct: Bool[Array, "*batch"]  # whether no other token has a larger logit


class _StaticArguments(NamedTuple):
    """The arguments that are not arrays."""

    chunk_size: int
    vocab_chunk: int | None
    softcap: float | None


class _Sums(NamedTuple):
    """The loss and its float32 gradients, of the chunks so far; None where a gradient is not needed."""

    loss: jax.Array
    hidden: jax.Array | None
    embedding: jax.Array | None
    weights: jax.Array | None


class _NeedsGrad(NamedTuple):
    """Which gradients the caller's differentiation needs; decided while tracing."""

    hidden: bool = False
    embedding: bool = False
    weights: bool = False


def loss_weights(
    mask_loss: Bool[Array, "*batch T"] | Int[Array, "*batch T"] | Float[Array, "*batch T"],
    reduction: Literal["token_mean", "example_mean"] = "token_mean",
) -> tuple[Float[Array, "*batch T"], Float[Array, ""]]:
    """Returns weights and a normalizer such that `token_cross_entropy(..., weights) / normalizer` is the mean loss.

    Sum losses and normalizers over micro-batches before dividing.

    Args:
        mask_loss: 1 or True at supervised tokens, 0 elsewhere.
        reduction: "token_mean": every supervised token has weight 1, and the normalizer is their number (as in
            transformers). "example_mean": the supervised tokens of a row share the weight 1, and the normalizer is the
            number of rows that have any (as in big_vision).

    Returns:
        Float32 weights of the shape of `mask_loss`, and the float32 normalizer, 0 for an empty batch.
    """
    mask = mask_loss.astype(jnp.float32)
    if reduction == "token_mean":
        return mask, mask.sum()
    tokens = mask.sum(axis=-1, keepdims=True)
    return mask / jnp.maximum(tokens, 1.0), (tokens > 0).sum().astype(jnp.float32)


def token_cross_entropy(
    hidden: Float[Array, "*batch D"],
    embedding: Float[Array, "V D"],
    targets: Int[Array, "*batch"],
    weights: Float[Array, "*batch"],
    chunk_size: int = 256,
    vocab_chunk: int | None = None,
    softcap: float | None = None,
) -> Float[Array, ""]:
    """Returns the sum over tokens of `weight * -log softmax(cap(hidden @ embedding.T))[target]`, in nats, float32.

    The specification is losses.reference.token_cross_entropy, which computes the logits of all tokens at once.

    Differentiable in hidden, embedding and weights in reverse mode. The gradient of a frozen embedding is not computed;
    the gradient of a trained one is accumulated in one float32 `[V, D]` array. Where the mesh of the context splits the
    rows (row_sharding.use_mesh), every device splits its own rows into chunks, and the embedding is gathered once.
    Tokens of weight 0 are not projected, except to fill the last chunk, or for the gradient of the weights.

    Args:
        hidden: final hidden states, `[B, T, D]` or `[N, D]`, any float dtype.
        embedding: the output (tied) embedding. Products run in its dtype and accumulate in float32; it is never cast.
        targets: token ids. An id outside [0, V) is allowed where the weight is 0 (transformers' -100).
        weights: a token of weight 0 adds nothing to value and gradients, even if its hidden state is NaN.
        chunk_size: tokens of the global batch per chunk. `chunk_size * V` float32 logits exist at a time, divided by
            the number of devices that share the rows (at least min(chunk_size, 64) tokens per device).
        vocab_chunk: entries per block of a log-sum-exp streamed over the vocabulary: memory no longer grows with V, at
            the cost of one more vocabulary projection. Leave it None if the embedding is sharded over the vocabulary:
            each device then holds its part of the logits anyway, and slicing would gather the embedding.
        softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2), exact in value and gradient.

    Raises:
        UserError: a `chunk_size` or `vocab_chunk` below 1.
    """
    token_chunks.check_sizes(chunk_size, vocab_chunk)
    static = _StaticArguments(chunk_size, vocab_chunk, softcap)
    return _cross_entropy(static, hidden, embedding, targets, weights)


def token_log_probs(
    hidden: Float[Array, "*batch D"],
    embedding: Float[Array, "V D"],
    targets: Int[Array, "*batch"],
    chunk_size: int = 256,
    vocab_chunk: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "*batch"]:
    """Returns the natural log-probability of every target, float32; arguments and errors as in `token_scores`."""
    return token_scores(hidden, embedding, targets, chunk_size, vocab_chunk, softcap).log_probs


def token_scores(
    hidden: Float[Array, "*batch D"],
    embedding: Float[Array, "V D"],
    targets: Int[Array, "*batch"],
    chunk_size: int = 256,
    vocab_chunk: int | None = None,
    softcap: float | None = None,
) -> TokenScores:
    """Returns log-probability and arg-max correctness of every target; arguments as in `token_cross_entropy`.

    It needs the memory of one chunk. Use it for evaluation only, since its derivative would keep the logits of all
    chunks.

    Raises:
        UserError: a `chunk_size` or `vocab_chunk` below 1.
    """
    return counted_scores(hidden, embedding, targets, None, chunk_size, vocab_chunk, softcap)


def counted_scores(
    hidden: Float[Array, "*batch D"],
    embedding: Float[Array, "V D"],
    targets: Int[Array, "*batch"],
    counts: Bool[Array, "*batch"] | None,
    chunk_size: int = 256,
    vocab_chunk: int | None = None,
    softcap: float | None = None,
) -> TokenScores:
    """Returns the `token_scores` of the tokens that count; it cannot be differentiated.

    Args:
      counts: tokens to score; the others, which are not projected, have log-probability 0 and are not correct. None
        scores all.
    """
    token_chunks.check_sizes(chunk_size, vocab_chunk)
    chunk_size = token_chunks.chunk_per_device(chunk_size, hidden)
    score = functools.partial(_score_rows, chunk_size, vocab_chunk, softcap)
    score_rows = row_sharding.by_rows(score, (True, False, True, True), (True, True))
    return TokenScores(*score_rows(hidden, embedding, targets, counts))


def _score_rows(chunk_size: int, vocab_chunk: int | None, softcap: float | None, hidden, embedding, targets, counts):
    """Returns the fields of `TokenScores` for the rows of one device."""
    chunks = token_chunks.chunks_of(targets.shape, chunk_size, counts)

    def step(index, scores: TokenScores) -> TokenScores:
        inputs, ids = cast(chunks.slice(hidden, index), embedding.dtype), chunks.slice(targets, index)
        statistics = streamed_statistics(inputs, embedding, ids, softcap, vocab_chunk)
        log_probs, correct = statistics.target - statistics.log_sum_exp, statistics.target >= statistics.maximum
        if counts is not None:
            counted = chunks.slice(counts, index)
            log_probs, correct = jnp.where(counted, log_probs, 0.0), correct & counted
        log_probs = chunks.update(scores.log_probs, index, log_probs)
        return TokenScores(log_probs, chunks.update(scores.correct, index, correct))

    zeros = TokenScores(jnp.zeros(targets.shape, jnp.float32), jnp.zeros(targets.shape, bool))
    return tuple(lax.fori_loop(0, chunks.used, step, zeros))


# ---- value and gradient ---------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(static, hidden, embedding, targets, weights):
    return _value_and_grad(static, _NeedsGrad(), hidden, embedding, targets, weights)[0]


def _cross_entropy_forward(static, hidden, embedding, targets, weights):
    # With symbolic_zeros, `perturbed` is False for arguments that are not differentiated: their gradients are skipped.
    needs_grad = _NeedsGrad(hidden.perturbed, embedding.perturbed, weights.perturbed)
    arrays = [argument.value for argument in (hidden, embedding, targets, weights)]
    loss, gradients = _value_and_grad(static, needs_grad, *arrays)
    like = [jnp.zeros((), array.dtype) for array in (arrays[0], arrays[1], arrays[3])]
    return loss, (gradients, like)


def _cross_entropy_backward(_static, residuals, cotangent):
    gradients, like = residuals
    # Gradients stay in float32 until they are multiplied by the cotangent: a float16 loss scale saves small ones.
    d_hidden, d_embedding, d_weights = (
        None if gradient is None else (gradient * cotangent).astype(array.dtype)
        for gradient, array in zip(gradients, like, strict=True)
    )
    return d_hidden, d_embedding, None, d_weights


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward, symbolic_zeros=True)


def _value_and_grad(static: _StaticArguments, needs_grad: _NeedsGrad, hidden, embedding, targets, weights):
    """Returns the loss, and its float32 gradients (or None) with respect to hidden, embedding and weights."""
    static = static._replace(chunk_size=token_chunks.chunk_per_device(static.chunk_size, hidden))
    on_rows = functools.partial(_value_and_grad_of_rows, static, needs_grad)
    by_rows = row_sharding.by_rows(on_rows, (True, False, True, True), (False, (True, False, True)))
    return by_rows(hidden, embedding, targets, weights)


def _value_and_grad_of_rows(static: _StaticArguments, needs_grad: _NeedsGrad, hidden, embedding, targets, weights):
    """Returns the loss and gradients for the rows of one device."""
    # The gradient of a scan or remat around this loss hoists what depends on targets and weights alone, which could be
    # a comparison of shape [B, T, V]; the barrier makes them depend on hidden.
    hidden, targets, weights = lax.optimization_barrier((hidden, targets, weights))
    # The gradient of a weight is the token's loss, also where the weight is 0.
    chunks = token_chunks.chunks_of(targets.shape, static.chunk_size, None if needs_grad.weights else weights != 0)
    zeros = _Sums(
        jnp.zeros((), jnp.float32),
        *(
            jnp.zeros(array.shape, jnp.float32) if needed else None
            for array, needed in zip((hidden, embedding, weights), needs_grad, strict=True)
        ),
    )

    def step(index, sums: _Sums) -> _Sums:
        states, ids, factors = (chunks.slice(array, index) for array in (hidden, targets, weights))
        nll, d_hidden, d_embedding = _chunk_loss(static, needs_grad, states, ids, factors, embedding, sums.embedding)
        return _Sums(
            sums.loss + token_chunks.apply_weights(factors, nll).sum(),
            None if sums.hidden is None or d_hidden is None else chunks.update(sums.hidden, index, d_hidden),
            d_embedding,
            None if sums.weights is None else chunks.update(sums.weights, index, nll),
        )

    loss, *gradients = lax.fori_loop(0, chunks.used, step, zeros)
    return loss, tuple(gradients)


def _chunk_loss(static, needs_grad: _NeedsGrad, hidden, targets, weights, embedding, d_embedding):
    """Returns a chunk's losses [N], the gradient of its hidden states [N, D], and d_embedding plus its part."""
    _, vocab_chunk, softcap = static
    inputs = cast(hidden, embedding.dtype)
    logits = None
    if vocab_chunk is None:
        logits = project(inputs, embedding, softcap)
        statistics = logit_statistics(logits, targets)
    else:
        statistics = streamed_statistics(inputs, embedding, targets, softcap, vocab_chunk)
    log_sum_exp = statistics.log_sum_exp
    weighted = token_chunks.apply_weights(weights[:, None], hidden.astype(jnp.float32))

    def add_block(gradients, block, start, logits=None):
        d_hidden, d_embedding = gradients
        logits = project(inputs, block, softcap) if logits is None else logits
        d_logits = logit_gradient(logits, log_sum_exp, targets - start, softcap)  # [N, v]
        d_logits = jnp.where(weights[:, None] != 0, d_logits, 0.0)
        if needs_grad.hidden:
            d_hidden += project_back(d_logits, block)
        if needs_grad.embedding:
            d_block = jnp.einsum("NV,ND->VD", d_logits, weighted, preferred_element_type=jnp.float32)
            old = lax.dynamic_slice_in_dim(d_embedding, start, block.shape[0])
            d_embedding = lax.dynamic_update_slice_in_dim(d_embedding, old + d_block, start, 0)
        return d_hidden, d_embedding

    gradients = jnp.zeros(hidden.shape, jnp.float32) if needs_grad.hidden else None, d_embedding
    if vocab_chunk is None:
        gradients = add_block(gradients, embedding, 0, logits)
    elif needs_grad.hidden or needs_grad.embedding:
        gradients = fold_blocks(add_block, gradients, embedding, vocab_chunk)
    d_hidden, d_embedding = gradients
    if d_hidden is not None:
        d_hidden = weights[:, None] * d_hidden
    return log_sum_exp - statistics.target, d_hidden, d_embedding
