"""How far the words that a tuned model expects are from those that the frozen one expects, never holding `[B, T, V]`.

  KL(frozen || tuned) = sum_v p_v (log p_v - log q_v),   p = softmax(frozen logits / tau), q = softmax(tuned ones / tau)

times tau^2, with which gradients keep their size (Hinton et al. 2015, https://arxiv.org/abs/1503.02531; Li and Hoiem
2016, https://arxiv.org/abs/1606.09282, use it against forgetting). In this direction the tuned model pays wherever the
frozen one expects a word that it no longer does.

As in chunked_cross_entropy.py the vocabulary projection is part of the loss, tokens are taken in chunks, and of each
chunk the value and the gradient are computed together. Axes: B rows, T positions, D model width, V vocabulary; chunks
of N tokens (token_chunks.py), v words of a block (vocab_projection.py).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from paligemma_jax.losses import token_chunks
from paligemma_jax.losses.vocab_projection import fold_blocks, logits_of, project_back
from paligemma_jax.models.numerics import cast
from train_jax.core import row_sharding
from train_jax.core.errors import UserError

_ARRAYS = 4  # as large as a chunk's logits, that are alive together


class _Settings(NamedTuple):
    """What of the arguments is no array."""

    temperature: float
    chunk_size: int
    vocab_chunk: int | None
    softcap: float | None


def token_divergence(
    hidden: Float[Array, "*batch D"],
    frozen: Float[Array, "*batch D"],
    embedding: Float[Array, "V D"],
    weights: Float[Array, "*batch"],
    temperature: int | float = 1.0,
    chunk_size: int = 256,
    vocab_chunk: int | None = None,
    softcap: float | None = None,
) -> Float[Array, ""]:
    """Sum over tokens of `weight * tau^2 * KL(frozen || tuned)`, in nats, float32.

    The specification is losses.reference.token_divergence, which holds the logits of all tokens.

    Args:
      hidden: final hidden states of the tuned model, of any float type; the only argument that gets a gradient.
      frozen: those of the frozen model at the same places.
      embedding: the output embedding of both.
      weights: a token of weight 0 adds nothing to value and gradient, whatever its hidden states hold.
      temperature: tau.
      chunk_size: as of `token_cross_entropy`, for as much memory: of a quarter as many tokens, two models' logits,
        probabilities and gradients are alive.
      vocab_chunk, softcap: as of `token_cross_entropy`. The cap comes before the temperature.

    Raises:
      UserError: a chunk of tokens or words below 1, or a temperature that is not positive.
    """
    token_chunks.check_sizes(chunk_size, vocab_chunk)
    if not temperature > 0:
        raise UserError(f"the divergence has temperature={temperature}, expected a positive number: change it.")
    settings = _Settings(float(temperature), max(chunk_size // _ARRAYS, 1), vocab_chunk, softcap)
    return _divergence(settings, hidden, *map(lax.stop_gradient, (frozen, embedding, weights)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(settings, hidden, frozen, embedding, weights):
    return _run(settings, False, hidden, frozen, embedding, weights)[0]


def _divergence_forward(settings, hidden, frozen, embedding, weights):
    value, gradient = _run(settings, True, hidden, frozen, embedding, weights)
    return value, (gradient, jnp.zeros((), hidden.dtype))


def _divergence_backward(_settings, residuals, cotangent):
    gradient, like = residuals
    # Cast after scaling, as in chunked_cross_entropy.py: a float16 loss scale arrives in time to save small gradients.
    return (gradient * cotangent).astype(like.dtype), None, None, None


_divergence.defvjp(_divergence_forward, _divergence_backward)


def _run(settings: _Settings, differentiate: bool, *arrays):
    """The value, and the float32 gradient of `hidden` or None."""
    settings = settings._replace(chunk_size=token_chunks.own_share(settings.chunk_size, arrays[0]))
    run = functools.partial(_run_rows, settings, differentiate)
    return row_sharding.by_rows(run, (True, True, False, True), (False, True))(*arrays)


def _run_rows(settings: _Settings, differentiate: bool, hidden, frozen, embedding, weights):
    """As `_run`, of rows that lie on one device."""
    shape = weights.shape
    hidden, frozen, weights = lax.optimization_barrier((hidden, frozen, weights))  # as in chunked_cross_entropy.py
    chunks = tuple(token_chunks.split(array, shape, settings.chunk_size) for array in (hidden, frozen, weights))

    def step(carry, chunk):
        def compute():
            return _chunk_divergence(settings, differentiate, *chunk, embedding)

        def skip():
            gradient = jnp.zeros(chunk[0].shape, jnp.float32) if differentiate else None
            return jnp.zeros(chunk[2].shape, jnp.float32), gradient

        return carry, lax.cond(jnp.any(chunk[2] != 0), compute, skip)

    _, (values, gradient) = lax.scan(step, None, chunks)
    value = token_chunks.weigh(chunks[2], values).sum()
    return value, token_chunks.join(gradient, shape, settings.chunk_size) if differentiate else None


def _chunk_divergence(settings: _Settings, differentiate: bool, hidden, frozen, weights, embedding):
    """One chunk: divergences [N], not yet weighted, and the weighted gradient of the hidden states [N, D]."""
    temperature, _, vocab_chunk, softcap = settings
    rows = tuple(cast(each, embedding.dtype) for each in (hidden, frozen))

    def logits_over(block):
        """Logits of both models over the words of a block, the tuned model's first."""
        return tuple(logits_of(each, block, softcap) for each in rows)

    def add_total(totals, block, _start, logits=None):
        return tuple(
            jnp.logaddexp(total, jax.nn.logsumexp(each / temperature, axis=-1))
            for total, each in zip(totals, logits or logits_over(block), strict=True)
        )

    def log_probs(*logits):
        return tuple(each / temperature - total[:, None] for each, total in zip(logits, totals, strict=True))

    def add_block(sums, block, _start, logits=None):
        tuned, base = logits or logits_over(block)
        log_q, log_p = log_probs(tuned, base)
        values = sums[0] + temperature**2 * (jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1)
        if not differentiate:
            return values, None
        # Without the barrier p is kept from above, in a third array as large as the logits.
        tuned, base, values = lax.optimization_barrier((tuned, base, values))
        log_q, log_p = log_probs(tuned, base)
        d_logits = temperature * (jnp.exp(log_q) - jnp.exp(log_p))
        if softcap is not None:
            d_logits *= 1.0 - jnp.square(tuned / softcap)
        d_logits = jnp.where(weights[:, None] != 0, d_logits, 0.0)
        return values, sums[1] + project_back(d_logits, block)

    nothing = jnp.full(weights.shape, -jnp.inf)
    sums = jnp.zeros(weights.shape, jnp.float32), jnp.zeros(hidden.shape, jnp.float32) if differentiate else None
    if vocab_chunk is None:
        logits = logits_over(embedding)
        totals = add_total((nothing, nothing), embedding, 0, logits)
        values, gradient = add_block(sums, embedding, 0, logits)
    else:  # the logits of a block are computed twice
        totals = fold_blocks(add_total, (nothing, nothing), embedding, vocab_chunk)
        values, gradient = fold_blocks(add_block, sums, embedding, vocab_chunk)
    return values, weights[:, None] * gradient if differentiate else None
