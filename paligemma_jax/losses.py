"""Token cross entropy over a large vocabulary that never holds `[B, T, V]`.

PaliGemma has 257,152 words: one row of 320 text positions is 330 MB of float32 logits, and a training step keeps them
several times. Here the vocabulary projection is part of the loss. Tokens are taken `chunk_size` at a time by a
`lax.scan`; for each chunk the logits, the loss and (when someone differentiates) the gradients are computed together
and the logits are dropped. The backward pass then only multiplies by the cotangent of the scalar loss. With
`vocab_chunk` the log-sum-exp is streamed over the vocabulary too, and the logits of a block are computed twice.

Axes: B rows, T positions, D model width, V vocabulary; K chunks of N tokens each (see `_split`), v words of a block.

Reduction lives in the weights (`loss_weights`): `token_cross_entropy(..., weights) / normalizer`, where under gradient
accumulation or over devices both terms are summed first and divided once.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

# float16 has no number between 0 and 6e-8, while a softmax over 257,152 words is full of them: the gradient of the
# logits (at most 1 in size) is scaled up before it is cast to float16, and the product is scaled down in float32.
_FLOAT16_SCALE = 2.0**15


class TokenScores(NamedTuple):
    """What evaluation asks of every target token."""

    log_probs: Float[Array, "*batch"]  # natural log of the model's probability of the target, float32
    correct: Bool[Array, "*batch"]  # no other word has a larger logit


class _Settings(NamedTuple):
    chunk_size: int
    vocab_chunk: int | None
    softcap: float | None


class _Wanted(NamedTuple):
    """Which gradients the caller's differentiation needs; decided while tracing."""

    hidden: bool = False
    embedding: bool = False
    weights: bool = False


class _Statistics(NamedTuple):
    """Running log-sum-exp over the words seen so far; every field float32 [N]."""

    maximum: jax.Array
    total: jax.Array  # sum of exp(logit - maximum)
    target: jax.Array  # logit of the target word, 0 while it has not been seen


def loss_weights(
    mask_loss: Bool[Array, "B T"] | Int[Array, "B T"] | Float[Array, "B T"],
    reduction: Literal["token_mean", "example_mean"] = "token_mean",
) -> tuple[Float[Array, "B T"], Float[Array, ""]]:
    """Weights and normalizer such that `token_cross_entropy(..., weights) / normalizer` is the wanted mean.

    `token_mean`: every supervised token counts 1, the normalizer is their number (transformers' loss).
    `example_mean`: a row's tokens share the weight 1, the normalizer is the number of rows that have any (big_vision).
    Rows without a supervised token count nothing. Sum losses and normalizers over micro-batches before dividing; the
    normalizer of an empty batch is 0.
    """
    mask = mask_loss.astype(jnp.float32)
    if reduction == "token_mean":
        return mask, mask.sum()
    tokens = mask.sum(axis=1, keepdims=True)
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

    Args:
        hidden: final hidden states, `[B, T, D]` or `[N, D]`, any float type.
        embedding: the output (tied) embedding. Products run in its type and accumulate in float32; it is never cast.
        targets: word ids. An id outside [0, V) is allowed where the weight is 0 (transformers' -100).
        weights: a token of weight 0 adds nothing to value and gradients, whatever its hidden state holds (NaN too).
        chunk_size: tokens of the global batch per chunk; `chunk_size * V` float32 logits are alive at a time.
        vocab_chunk: words per block of a streamed log-sum-exp; memory then no longer grows with V, for one more
            vocabulary projection. Leave it off where the embedding is sharded over words: there each device holds
            its part of the logits anyway, and slicing would gather the embedding.
        softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2), exact in value and gradient.

    Differentiable in hidden, embedding and weights in reverse mode. The gradient of an embedding that is not
    differentiated (frozen) is never computed; of one that trains, it is accumulated in one float32 `[V, D]` array.
    Chunks are cut within groups of rows, so a batch sharded over rows stays where it is; chunks in which no token has
    weight are skipped.
    """
    return _cross_entropy(_Settings(chunk_size, vocab_chunk, softcap), hidden, embedding, targets, weights)


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
    settings = _Settings(chunk_size, vocab_chunk, softcap)

    def score(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        statistics = _statistics(settings, chunk[0].astype(embedding.dtype), embedding, chunk[1])
        return statistics.target - _log_sum_exp(statistics), statistics.target >= statistics.maximum

    scores = lax.map(score, (_split(hidden, targets.shape, chunk_size), _split(targets, targets.shape, chunk_size)))
    return TokenScores(*(_join(array, targets.shape, chunk_size) for array in scores))


# ---- value and gradient ---------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(settings, hidden, embedding, targets, weights):
    return _run(settings, _Wanted(), hidden, embedding, targets, weights)[0]


def _cross_entropy_forward(settings, hidden, embedding, targets, weights):
    # symbolic_zeros tells which arguments the caller differentiates: an embedding held constant costs nothing.
    wanted = _Wanted(hidden.perturbed, embedding.perturbed, weights.perturbed)
    arrays = [argument.value for argument in (hidden, embedding, targets, weights)]
    loss, gradients = _run(settings, wanted, *arrays)
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


def _run(settings: _Settings, wanted: _Wanted, hidden, embedding, targets, weights):
    """Loss, and for hidden, embedding and weights the float32 gradient of the loss or None."""
    shape = targets.shape
    # The gradient of a scan (or remat) around this loss moves out what depends on targets and weights alone, were it
    # only a comparison of [B, T, V]; the barrier makes them depend on hidden.
    hidden, targets, weights = lax.optimization_barrier((hidden, targets, weights))
    chunks = tuple(_split(array, shape, settings.chunk_size) for array in (hidden, targets, weights))
    initial = jnp.zeros(embedding.shape, jnp.float32) if wanted.embedding else None

    def step(d_embedding, chunk):
        def compute(d_embedding):
            return _chunk_loss(settings, wanted, *chunk, embedding, d_embedding)

        def skip(d_embedding):
            d_chunk = jnp.zeros(chunk[0].shape, jnp.float32) if wanted.hidden else None
            return d_embedding, (jnp.zeros(chunk[1].shape, jnp.float32), d_chunk)

        if wanted.weights:  # the gradient of a weight is the token's loss, needed where the weight is 0 as well
            return compute(d_embedding)
        return lax.cond(jnp.any(chunk[2] != 0), compute, skip, d_embedding)

    d_embedding, (nll, d_hidden) = lax.scan(step, initial, chunks)
    loss = _weigh(chunks[2], nll).sum()
    d_hidden = None if d_hidden is None else _join(d_hidden, shape, settings.chunk_size)
    return loss, (d_hidden, d_embedding, _join(nll, shape, settings.chunk_size) if wanted.weights else None)


def _chunk_loss(settings, wanted: _Wanted, hidden, targets, weights, embedding, d_embedding):
    """One chunk: (d_embedding plus this chunk's part, (losses [N], gradient of the hidden states [N, D]))."""
    rows = hidden.astype(embedding.dtype)
    if settings.vocab_chunk is None:
        logits = _logits(settings, rows, embedding)
        statistics = _block_statistics(logits, targets)
    else:
        statistics = _statistics(settings, rows, embedding, targets)
    log_sum_exp = _log_sum_exp(statistics)
    weighted = _weigh(weights[:, None], hidden.astype(jnp.float32))

    def add_block(gradients, block, start, logits):
        d_rows, d_embedding = gradients
        d_logits = _logit_gradient(settings, logits, log_sum_exp, targets - start)  # [N, v]
        d_logits = jnp.where(weights[:, None] != 0, d_logits, 0.0)
        if wanted.hidden:
            d_rows += _project_back(d_logits, block)
        if wanted.embedding:
            d_block = jnp.einsum("NV,ND->VD", d_logits, weighted, preferred_element_type=jnp.float32)
            old = lax.dynamic_slice_in_dim(d_embedding, start, block.shape[0])
            d_embedding = lax.dynamic_update_slice_in_dim(d_embedding, old + d_block, start, 0)
        return d_rows, d_embedding

    d_rows = jnp.zeros(hidden.shape, jnp.float32) if wanted.hidden else None
    gradients = d_rows, d_embedding
    if settings.vocab_chunk is None:
        gradients = add_block(gradients, embedding, 0, logits)
    elif wanted.hidden or wanted.embedding:
        gradients = _fold_blocks(
            lambda carry, block, start: add_block(carry, block, start, _logits(settings, rows, block)),
            gradients,
            embedding,
            settings.vocab_chunk,
        )
    d_rows, d_embedding = gradients
    if wanted.hidden:
        d_rows = weights[:, None] * d_rows
    return d_embedding, (log_sum_exp - statistics.target, d_rows)


# ---- logits of one chunk --------------------------------------------------------------------------------------------


def _logits(settings: _Settings, rows: jax.Array, block: jax.Array) -> jax.Array:
    logits = jnp.einsum("ND,VD->NV", rows, block, preferred_element_type=jnp.float32)
    return logits if settings.softcap is None else settings.softcap * jnp.tanh(logits / settings.softcap)


def _block_statistics(logits: jax.Array, targets: jax.Array) -> _Statistics:
    maximum = logits.max(axis=-1)
    total = jnp.exp(logits - maximum[:, None]).sum(axis=-1)
    here = (targets >= 0) & (targets < logits.shape[-1])
    target = jnp.take_along_axis(logits, targets[:, None], axis=-1, mode="clip")[:, 0]
    return _Statistics(maximum, total, jnp.where(here, target, 0.0))


def _statistics(settings: _Settings, rows: jax.Array, embedding: jax.Array, targets: jax.Array) -> _Statistics:
    def add_block(seen: _Statistics, block: jax.Array, start: jax.Array | int) -> _Statistics:
        new = _block_statistics(_logits(settings, rows, block), targets - start)
        maximum = jnp.maximum(seen.maximum, new.maximum)
        total = seen.total * jnp.exp(seen.maximum - maximum) + new.total * jnp.exp(new.maximum - maximum)
        return _Statistics(maximum, total, seen.target + new.target)

    zeros = jnp.zeros(targets.shape, jnp.float32)
    nothing = _Statistics(jnp.full(targets.shape, jnp.finfo(jnp.float32).min), zeros, zeros)
    return _fold_blocks(add_block, nothing, embedding, settings.vocab_chunk)


def _log_sum_exp(statistics: _Statistics) -> jax.Array:
    return statistics.maximum + jnp.log(statistics.total)


def _logit_gradient(settings: _Settings, logits, log_sum_exp, targets) -> jax.Array:
    """d nll / d (uncapped logit), float32 [N, v]: (softmax - one hot) times the slope of the soft cap."""
    is_target = lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[:, None]
    gradient = jnp.exp(logits - log_sum_exp[:, None]) - is_target
    if settings.softcap is None:
        return gradient
    return gradient * (1.0 - jnp.square(logits / settings.softcap))


def _project_back(d_logits: jax.Array, block: jax.Array) -> jax.Array:
    scale = _FLOAT16_SCALE if block.dtype == jnp.float16 else 1.0
    d_logits = (d_logits * scale).astype(block.dtype)
    return jnp.einsum("NV,VD->ND", d_logits, block, preferred_element_type=jnp.float32) / scale


def _fold_blocks(add_block: Callable, carry, embedding: jax.Array, vocab_chunk: int | None):
    """Fold `add_block(carry, block [v, D], start)` over blocks of words, the last one as short as it comes."""
    vocab = embedding.shape[0]
    size = min(vocab_chunk or vocab, vocab)
    full, rest = divmod(vocab, size)
    if full == 1 and rest == 0:
        return add_block(carry, embedding, 0)

    def step(index, carry):
        return add_block(carry, lax.dynamic_slice_in_dim(embedding, index * size, size), index * size)

    carry = lax.fori_loop(0, full, step, carry)
    return add_block(carry, embedding[full * size :], full * size) if rest else carry


# ---- chunks of tokens -----------------------------------------------------------------------------------------------


def _weigh(weights: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.where(weights != 0, weights * values, 0.0)


def _groups(shape: tuple[int, ...], chunk_size: int) -> int:
    """How many groups of rows share each chunk: the largest divisor of B that leaves each a token or more."""
    return max(g for g in range(1, min(shape[0], chunk_size) + 1) if shape[0] % g == 0)


def _split(array: jax.Array, shape: tuple[int, ...], chunk_size: int) -> jax.Array:
    """`[*shape, ...]` -> chunks `[K, N, ...]` with N <= chunk_size, the last chunk padded with zeros.

    A chunk takes N / G tokens from each of G groups of neighbouring rows. Plain flattening of B and T would put each
    chunk on one device of a batch sharded over rows; so every device works on its share of every chunk.
    """
    groups = _groups(shape, chunk_size)
    tail = array.shape[len(shape) :]
    array = array.reshape(groups, -1, *tail)
    tokens = min(chunk_size // groups, array.shape[1])
    array = jnp.pad(array, [(0, 0), (0, -array.shape[1] % tokens), *([(0, 0)] * len(tail))])
    chunks = jnp.moveaxis(array.reshape(groups, -1, tokens, *tail), 1, 0)
    # The two token axes become one because XLA reuses the logits' buffer for their gradient only without a reshape.
    return chunks.reshape(-1, groups * tokens, *tail)


def _join(chunks: jax.Array, shape: tuple[int, ...], chunk_size: int) -> jax.Array:
    """Inverse of `_split`: `[K, N, ...]` -> `[*shape, ...]`."""
    groups = _groups(shape, chunk_size)
    count, tokens, *tail = chunks.shape
    array = jnp.moveaxis(chunks.reshape(count, groups, tokens // groups, *tail), 0, 1)
    array = array.reshape(groups, -1, *tail)[:, : math.prod(shape) // groups]
    return array.reshape(*shape, *tail)
