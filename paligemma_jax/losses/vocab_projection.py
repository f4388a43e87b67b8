"""The vocabulary projection of some tokens: log-sum-exp of the logits, optionally in blocks of the vocabulary.

Axes: N tokens, D model width, V vocabulary, v entries of a block of the vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from paligemma_jax.models.numerics import soft_cap

# float16 has no number between 0 and 6e-8, but a softmax over 257,152 tokens has many: the gradient of the logits (at
# most 1 in magnitude) is scaled up before the cast to float16, and the product is scaled down in float32.
_FLOAT16_SCALE = 2.0**15


class LogitStatistics(NamedTuple):
    """Running log-sum-exp of the logits over the vocabulary; every field is float32 [N]."""

    maximum: jax.Array
    total: jax.Array  # sum of exp(logit - maximum)
    target: jax.Array  # logit of the target, 0 until its block is reached

    @property
    def log_sum_exp(self) -> jax.Array:
        """Log-sum-exp of the logits so far."""
        return self.maximum + jnp.log(self.total)


def project(hidden: jax.Array, block: jax.Array, softcap: float | None) -> jax.Array:
    """Returns soft-capped float32 logits [N, v] of hidden states [N, D] over a block of the embedding [v, D]."""
    logits = jnp.einsum("ND,VD->NV", hidden, block, preferred_element_type=jnp.float32)
    return soft_cap(logits, softcap)


def logit_statistics(logits: jax.Array, targets: jax.Array) -> LogitStatistics:
    """Returns the statistics of logits [N, v]; a target outside [0, v) belongs to another block."""
    maximum = logits.max(axis=-1)
    total = jnp.exp(logits - maximum[:, None]).sum(axis=-1)
    in_block = (targets >= 0) & (targets < logits.shape[-1])
    target = jnp.take_along_axis(logits, targets[:, None], axis=-1, mode="clip")[:, 0]
    return LogitStatistics(maximum, total, jnp.where(in_block, target, 0.0))


def streamed_statistics(
    hidden: jax.Array, embedding: jax.Array, targets: jax.Array, softcap: float | None, vocab_chunk: int | None
) -> LogitStatistics:
    """Returns the statistics over the whole vocabulary; `vocab_chunk` logits (None: all) per token exist at a time."""

    def add_block(running: LogitStatistics, block: jax.Array, start: jax.Array | int) -> LogitStatistics:
        new = logit_statistics(project(hidden, block, softcap), targets - start)
        maximum = jnp.maximum(running.maximum, new.maximum)
        total = running.total * jnp.exp(running.maximum - maximum) + new.total * jnp.exp(new.maximum - maximum)
        return LogitStatistics(maximum, total, running.target + new.target)

    zeros = jnp.zeros(targets.shape, jnp.float32)
    initial = LogitStatistics(jnp.full(targets.shape, jnp.finfo(jnp.float32).min), zeros, zeros)
    return fold_blocks(add_block, initial, embedding, vocab_chunk)


def logit_gradient(logits: jax.Array, log_sum_exp: jax.Array, targets: jax.Array, softcap: float | None) -> jax.Array:
    """Returns d nll / d (uncapped logit), float32 [N, v]: (softmax - one-hot) times the slope of the soft cap."""
    is_target = lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[:, None]
    gradient = jnp.exp(logits - log_sum_exp[:, None]) - is_target
    return gradient if softcap is None else gradient * (1.0 - jnp.square(logits / softcap))


def project_back(d_logits: jax.Array, block: jax.Array) -> jax.Array:
    """Returns the gradient of the hidden states, float32 [N, D], given the gradient [N, v] of a block of logits."""
    scale = _FLOAT16_SCALE if block.dtype == jnp.float16 else 1.0
    d_logits = (d_logits * scale).astype(block.dtype)
    return jnp.einsum("NV,VD->ND", d_logits, block, preferred_element_type=jnp.float32) / scale


def fold_blocks(add_block: Callable, carry, embedding: jax.Array, vocab_chunk: int | None):
    """Folds `add_block(carry, block [v, D], start)` over blocks of the vocabulary; the last one may be shorter."""
    vocab = embedding.shape[0]
    size = min(vocab_chunk or vocab, vocab)
    full, rest = divmod(vocab, size)
    if full == 1 and rest == 0:
        return add_block(carry, embedding, 0)

    def step(index, carry):
        return add_block(carry, lax.dynamic_slice_in_dim(embedding, index * size, size), index * size)

    carry = lax.fori_loop(0, full, step, carry)
    return add_block(carry, embedding[full * size :], full * size) if rest else carry
