"""Token cross entropy over a large vocabulary that never holds `[B, T, V]`.

PaliGemma has 257,152 words: one row of 320 text positions is 330 MB of float32 logits, and a training step keeps them
several times. Here the vocabulary projection is part of the loss. Tokens are taken `chunk_size` at a time by a
`lax.scan`; for each chunk the logits, the loss and (when someone differentiates) the gradients are computed together
and the logits are dropped. The backward pass then only multiplies by the cotangent of the scalar loss. With
`vocab_chunk` the log-sum-exp is streamed over the vocabulary too, and the logits of a block are computed twice.

Axes: B rows, T positions, D model width, V vocabulary; K chunks of N tokens each (token_chunks.py), v words of a block
(vocab_projection.py).

Reduction lives in the weights (`loss_weights`): `token_cross_entropy(..., weights) / normalizer`, where under gradient
accumulation or over devices both terms are summed first and divided once.
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
    logits_of,
    project_back,
    statistics_of,
    streamed_statistics,
)
from paligemma_jax.models.numerics import cast
from train_jax.core import row_sharding


class TokenScores(NamedTuple):
    """What evaluation asks of every target token."""

    log_probs: Float[Array, "*batch"]  # natural log of the model's probability of the target, float32
    correct: Bool[Array, "*batch"]  # no other word has a larger logit


class _Settings(NamedTuple):
    """What of the arguments is no array."""

    chunk_size: int
    vocab_chunk: int | None
    softcap: float | None


class _NeedsGrad(NamedTuple):
    """Which gradients the caller's differentiation needs; decided while tracing."""

    hidden: bool = False
    embedding: bool = False
    weights: bool = False


def loss_weights(
    mask_loss: Bool[Array, "*batch T"] | Int[Array, "*batch T"] | Float[Array, "*batch T"],
    reduction: Literal["token_mean", "example_mean"] = "token_mean",
) -> tuple[Float[Array, "*batch T"], Float[Array, ""]]:
    """Weights and normalizer such that `token_cross_entropy(..., weights) / normalizer` is the wanted mean.

    `token_mean`: every supervised token counts 1, the normalizer is their number (transformers' loss).
    `example_mean`: a row's tokens share the weight 1, the normalizer is the number of rows that have any (big_vision).
    Rows without a supervised token count nothing. Sum losses and normalizers over micro-batches before dividing; the
    normalizer of an empty batch is 0.
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
    """Sum over tokens of `weight * -log softmax(cap(hidden @ embedding.T))[target]`, in nats, float32.

    The specification is losses.reference.token_cross_entropy, which holds the logits of all tokens.

    Args:
        hidden: final hidden states, `[B, T, D]` or `[N, D]`, any float type.
        embedding: the output (tied) embedding. Products run in its type and accumulate in float32; it is never cast.
        targets: word ids. An id outside [0, V) is allowed where the weight is 0 (transformers' -100).
        weights: a token of weight 0 adds nothing to value and gradients, whatever its hidden state holds (NaN too).
        chunk_size: tokens of the global batch per chunk; `chunk_size * V` float32 logits are alive at a time, divided
            by the devices that share the rows (but of 64 tokens a device, where `chunk_size` is no less).
        vocab_chunk: words per block of a streamed log-sum-exp; memory then no longer grows with V, for one more
            vocabulary projection. Leave it off where the embedding is sharded over words: there each device holds
            its part of the logits anyway, and slicing would gather the embedding.
        softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2), exact in value and gradient.

    Differentiable in hidden, embedding and weights in reverse mode. The gradient of an embedding that is not
    differentiated (frozen) is never computed; of one that trains, it is accumulated in one float32 `[V, D]` array.
    Where the mesh of the context splits the rows (row_sharding.over), every device cuts chunks of its own rows, and the
    embedding is gathered once. Chunks in which no token has weight are skipped.

    Raises UserError for a `chunk_size` or `vocab_chunk` below 1.
    """
    return _cross_entropy(_checked(chunk_size, vocab_chunk, softcap), hidden, embedding, targets, weights)


def token_log_probs(
    hidden: Float[Array, "*batch D"],
    embedding: Float[Array, "V D"],
    targets: Int[Array, "*batch"],
    chunk_size: int = 256,
    vocab_chunk: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "*batch"]:
    """Natural log-probability of every target, float32; see `token_scores`."""
    return token_scores(hidden, embedding, targets, chunk_size, vocab_chunk, softcap).log_probs


def token_scores(
    hidden: Float[Array, "*batch D"],
    embedding: Float[Array, "V D"],
    targets: Int[Array, "*batch"],
    chunk_size: int = 256,
    vocab_chunk: int | None = None,
    softcap: float | None = None,
) -> TokenScores:
    """Log-probability and arg-max correctness of every target, for evaluation; arguments as `token_cross_entropy`.

    Memory is that of one chunk. Not meant to be differentiated: autodiff would keep the logits.
    """
    _checked(chunk_size, vocab_chunk, softcap)
    chunk_size = token_chunks.own_share(chunk_size, hidden)
    score = functools.partial(_score_rows, chunk_size, vocab_chunk, softcap)
    return row_sharding.by_rows(score, (True, False, True), TokenScores(True, True))(hidden, embedding, targets)


def _score_rows(chunk_size: int, vocab_chunk: int | None, softcap: float | None, hidden, embedding, targets):
    """As `token_scores`, of rows that lie on one device."""
    shape = targets.shape

    def score(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows = cast(chunk[0], embedding.dtype)
        statistics = streamed_statistics(rows, embedding, chunk[1], softcap, vocab_chunk)
        return statistics.target - statistics.log_sum_exp, statistics.target >= statistics.maximum

    chunks = tuple(token_chunks.split(array, shape, chunk_size) for array in (hidden, targets))
    return TokenScores(*(token_chunks.join(array, shape, chunk_size) for array in lax.map(score, chunks)))


def _checked(chunk_size: int, vocab_chunk: int | None, softcap: float | None) -> _Settings:
    token_chunks.check_sizes(chunk_size, vocab_chunk)
    return _Settings(chunk_size, vocab_chunk, softcap)


# ---- value and gradient ---------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(settings, hidden, embedding, targets, weights):
    return _run(settings, _NeedsGrad(), hidden, embedding, targets, weights)[0]


def _cross_entropy_forward(settings, hidden, embedding, targets, weights):
    # symbolic_zeros tells which arguments the caller differentiates: an embedding held constant costs nothing.
    needs_grad = _NeedsGrad(hidden.perturbed, embedding.perturbed, weights.perturbed)
    arrays = [argument.value for argument in (hidden, embedding, targets, weights)]
    loss, gradients = _run(settings, needs_grad, *arrays)
    like = [jnp.zeros((), array.dtype) for array in (arrays[0], arrays[1], arrays[3])]
    return loss, (gradients, like)


def _cross_entropy_backward(_settings, residuals, cotangent):
    gradients, like = residuals
    # Gradients wait in float32 and are cast after scaling: a float16 loss scale arrives in time to save small ones.
    d_hidden, d_embedding, d_weights = (
        None if gradient is None else (gradient * cotangent).astype(array.dtype)
        for gradient, array in zip(gradients, like, strict=True)
    )
    return d_hidden, d_embedding, None, d_weights


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward, symbolic_zeros=True)


def _run(settings: _Settings, needs_grad: _NeedsGrad, *arrays):
    """Loss, and for hidden, embedding and weights the float32 gradient of the loss or None."""
    settings = settings._replace(chunk_size=token_chunks.own_share(settings.chunk_size, arrays[0]))
    run = functools.partial(_run_rows, settings, needs_grad)
    return row_sharding.by_rows(run, (True, False, True, True), (False, (True, False, True)))(*arrays)


def _run_rows(settings: _Settings, needs_grad: _NeedsGrad, hidden, embedding, targets, weights):
    """As `_run`, of rows that lie on one device."""
    shape = targets.shape
    # The gradient of a scan (or remat) around this loss moves out what depends on targets and weights alone, were it
    # only a comparison of [B, T, V]; the barrier makes them depend on hidden.
    hidden, targets, weights = lax.optimization_barrier((hidden, targets, weights))
    chunks = tuple(token_chunks.split(array, shape, settings.chunk_size) for array in (hidden, targets, weights))
    initial = jnp.zeros(embedding.shape, jnp.float32) if needs_grad.embedding else None

    def step(d_embedding, chunk):
        def compute(d_embedding):
            return _chunk_loss(settings, needs_grad, *chunk, embedding, d_embedding)

        def skip(d_embedding):
            d_chunk = jnp.zeros(chunk[0].shape, jnp.float32) if needs_grad.hidden else None
            return d_embedding, (jnp.zeros(chunk[1].shape, jnp.float32), d_chunk)

        if needs_grad.weights:  # the gradient of a weight is the token's loss, needed where the weight is 0 as well
            return compute(d_embedding)
        return lax.cond(jnp.any(chunk[2] != 0), compute, skip, d_embedding)

    d_embedding, (nll, d_hidden) = lax.scan(step, initial, chunks)
    loss = token_chunks.weigh(chunks[2], nll).sum()
    d_hidden = None if d_hidden is None else token_chunks.join(d_hidden, shape, settings.chunk_size)
    d_weights = token_chunks.join(nll, shape, settings.chunk_size) if needs_grad.weights else None
    return loss, (d_hidden, d_embedding, d_weights)


def _chunk_loss(settings, needs_grad: _NeedsGrad, hidden, targets, weights, embedding, d_embedding):
    """One chunk: (d_embedding plus this chunk's part, (losses [N], gradient of the hidden states [N, D]))."""
    _, vocab_chunk, softcap = settings
    rows = cast(hidden, embedding.dtype)
    if vocab_chunk is None:
        logits = logits_of(rows, embedding, softcap)
        statistics = statistics_of(logits, targets)
    else:
        statistics = streamed_statistics(rows, embedding, targets, softcap, vocab_chunk)
    log_sum_exp = statistics.log_sum_exp
    weighted = token_chunks.weigh(weights[:, None], hidden.astype(jnp.float32))

    def add_block(gradients, block, start, logits):
        d_rows, d_embedding = gradients
        d_logits = logit_gradient(logits, log_sum_exp, targets - start, softcap)  # [N, v]
        d_logits = jnp.where(weights[:, None] != 0, d_logits, 0.0)
        if needs_grad.hidden:
            d_rows += project_back(d_logits, block)
        if needs_grad.embedding:
            d_block = jnp.einsum("NV,ND->VD", d_logits, weighted, preferred_element_type=jnp.float32)
            old = lax.dynamic_slice_in_dim(d_embedding, start, block.shape[0])
            d_embedding = lax.dynamic_update_slice_in_dim(d_embedding, old + d_block, start, 0)
        return d_rows, d_embedding

    d_rows = jnp.zeros(hidden.shape, jnp.float32) if needs_grad.hidden else None
    gradients = d_rows, d_embedding
    if vocab_chunk is None:
        gradients = add_block(gradients, embedding, 0, logits)
    elif needs_grad.hidden or needs_grad.embedding:
        gradients = fold_blocks(
            lambda carry, block, start: add_block(carry, block, start, logits_of(rows, block, softcap)),
            gradients,
            embedding,
            vocab_chunk,
        )
    d_rows, d_embedding = gradients
    if needs_grad.hidden:
        d_rows = weights[:, None] * d_rows
    return d_embedding, (log_sum_exp - statistics.target, d_rows)
