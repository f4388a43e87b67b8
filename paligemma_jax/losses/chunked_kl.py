"""Distillation loss: KL divergence from a frozen model's next-token distribution, without `[B, T, V]` logits.

  KL(frozen || tuned) = sum_v p_v (log p_v - log q_v), p = softmax(frozen logits / tau), q = softmax(tuned logits / tau)

times tau^2, which keeps the size of the gradients (Hinton et al. 2015, https://arxiv.org/abs/1503.02531; Li and Hoiem
2016, https://arxiv.org/abs/1606.09282, use it against forgetting). In this direction the tuned model is penalized where
it gives low probability to a token that the frozen model expects.

As in chunked_cross_entropy.py, the vocabulary projection is part of the loss, tokens are processed in chunks, and the
value and the gradient of a chunk are computed together. Axes: B rows, T positions, D model width, V vocabulary; chunks
of N tokens (token_chunks.py), v entries of a block of the vocabulary (vocab_projection.py).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from paligemma_jax.losses import token_chunks
from paligemma_jax.losses.vocab_projection import fold_blocks, project, project_back
from paligemma_jax.models.numerics import cast
from train_jax.core import row_sharding
from train_jax.core.errors import UserError

_LIVE_ARRAYS = 4  # number of arrays as large as a chunk's logits that exist at the same time


class _StaticArguments(NamedTuple):
    """The arguments that are not arrays."""

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
    """Returns the sum over tokens of `weight * tau^2 * KL(frozen || tuned)`, in nats, float32.

    The specification is losses.reference.token_divergence, which computes the logits of all tokens at once.

    Args:
      hidden: final hidden states of the tuned model, of any float dtype; the only argument that gets a gradient.
      frozen: final hidden states of the frozen model at the same positions.
      embedding: the output embedding of both models.
      weights: a token of weight 0 adds nothing to value and gradient, even if its hidden states are not finite.
      temperature: tau.
      chunk_size: as in `token_cross_entropy`, for the same memory: a chunk has a quarter of the tokens, since logits,
        probabilities and gradients of two models exist at the same time.
      vocab_chunk, softcap: as in `token_cross_entropy`. The cap is applied before the temperature.

    Raises:
      UserError: a `chunk_size` or `vocab_chunk` below 1, or a temperature that is not positive.
    """
    token_chunks.check_sizes(chunk_size, vocab_chunk)
    if not temperature > 0:
        raise UserError(f"the divergence has temperature={temperature}, expected a positive number: change it.")
    static = _StaticArguments(float(temperature), max(chunk_size // _LIVE_ARRAYS, 1), vocab_chunk, softcap)
    return _divergence(static, hidden, *map(lax.stop_gradient, (frozen, embedding, weights)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(static, hidden, frozen, embedding, weights):
    return _value_and_grad(static, False, hidden, frozen, embedding, weights)[0]


def _divergence_forward(static, hidden, frozen, embedding, weights):
    value, gradient = _value_and_grad(static, True, hidden, frozen, embedding, weights)
    return value, (gradient, jnp.zeros((), hidden.dtype))


def _divergence_backward(_static, residuals, cotangent):
    gradient, like = residuals
    # Cast after scaling, as in chunked_cross_entropy.py.
    return (gradient * cotangent).astype(like.dtype), None, None, None


_divergence.defvjp(_divergence_forward, _divergence_backward)


def _value_and_grad(static: _StaticArguments, needs_grad: bool, hidden, frozen, embedding, weights):
    """Returns the value, and the float32 gradient with respect to `hidden` or None."""
    static = static._replace(chunk_size=token_chunks.chunk_per_device(static.chunk_size, hidden))
    on_rows = functools.partial(_value_and_grad_of_rows, static, needs_grad)
    by_rows = row_sharding.by_rows(on_rows, (True, True, False, True), (False, True))
    return by_rows(hidden, frozen, embedding, weights)


def _value_and_grad_of_rows(static: _StaticArguments, needs_grad: bool, hidden, frozen, embedding, weights):
    """Returns the value and gradient for the rows of one device."""
    hidden, frozen, weights = lax.optimization_barrier((hidden, frozen, weights))  # as in chunked_cross_entropy.py
    chunks = token_chunks.chunks_of(weights.shape, static.chunk_size, weights != 0)

    def step(index, sums):
        value, gradient = sums
        states, frozen_states, factors = (chunks.slice(array, index) for array in (hidden, frozen, weights))
        values, d_hidden = _chunk_divergence(static, needs_grad, states, frozen_states, factors, embedding)
        value += token_chunks.apply_weights(factors, values).sum()
        return value, None if d_hidden is None else chunks.update(gradient, index, d_hidden)

    zeros = jnp.zeros((), jnp.float32), jnp.zeros(hidden.shape, jnp.float32) if needs_grad else None
    return lax.fori_loop(0, chunks.used, step, zeros)


def _chunk_divergence(static: _StaticArguments, needs_grad: bool, hidden, frozen, weights, embedding):
    """Returns one chunk's divergences [N], not weighted, and the weighted gradient of the hidden states [N, D]."""
    temperature, _, vocab_chunk, softcap = static
    inputs = tuple(cast(states, embedding.dtype) for states in (hidden, frozen))

    def logits_over(block):
        """Returns the logits of both models over a block of the vocabulary, the tuned model's first."""
        return tuple(project(states, block, softcap) for states in inputs)

    def add_log_sum_exp(totals, block, _start, logits=None):
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
        if not needs_grad:
            return values, None
        # Without the barrier p would be kept from above, in a third array as large as the logits.
        tuned, base, values = lax.optimization_barrier((tuned, base, values))
        log_q, log_p = log_probs(tuned, base)
        d_logits = temperature * (jnp.exp(log_q) - jnp.exp(log_p))
        if softcap is not None:
            d_logits *= 1.0 - jnp.square(tuned / softcap)
        d_logits = jnp.where(weights[:, None] != 0, d_logits, 0.0)
        return values, sums[1] + project_back(d_logits, block)

    log_zero = jnp.full(weights.shape, -jnp.inf)
    sums = jnp.zeros(weights.shape, jnp.float32), jnp.zeros(hidden.shape, jnp.float32) if needs_grad else None
    if vocab_chunk is None:
        logits = logits_over(embedding)
        totals = add_log_sum_exp((log_zero, log_zero), embedding, 0, logits)
        values, gradient = add_block(sums, embedding, 0, logits)
    else:  # the logits of a block are computed twice
        totals = fold_blocks(add_log_sum_exp, (log_zero, log_zero), embedding, vocab_chunk)
        values, gradient = fold_blocks(add_block, sums, embedding, vocab_chunk)
    return values, weights[:, None] * gradient if needs_grad else None
