"""Logits of some tokens over the words: their log-sum-exp, all at once or a block of words at a time, and its gradient.

Axes: N tokens, D model width, V vocabulary, v words of a block.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from paligemma_jax.models.numerics import soft_cap

# float16 has no number between 0 and 6e-8, while a softmax over 257,152 words is full of them: the gradient of the
# logits (at most 1 in size) is scaled up before it is cast to float16, and the product is scaled down in float32.
_FLOAT16_SCALE = 2.0**15


class Statistics(NamedTuple):
    """Running log-sum-exp over the words seen so far; every field float32 [N]."""

    maximum: jax.Array
    total: jax.Array  # sum of exp(logit - maximum)
    target: jax.Array  # logit of the target word, 0 while it has not been seen

    @property
    def log_sum_exp(self) -> jax.Array:
        return self.maximum + jnp.log(self.total)


def logits_of(rows: jax.Array, words: jax.Array, softcap: float | None) -> jax.Array:
    """Float32 logits [N, v] of rows [N, D] over words [v, D] of the same type, soft-capped."""
    logits = jnp.einsum("ND,VD->NV", rows, words, preferred_element_type=jnp.float32)
    return soft_cap(logits, softcap)


def statistics_of(logits: jax.Array, targets: jax.Array) -> Statistics:
    """Statistics of logits [N, v]; a target outside [0, v) is not among these words."""
    maximum = logits.max(axis=-1)
    total = jnp.exp(logits - maximum[:, None]).sum(axis=-1)
    here = (targets >= 0) & (targets < logits.shape[-1])
    target = jnp.take_along_axis(logits, targets[:, None], axis=-1, mode="clip")[:, 0]
    return Statistics(maximum, total, jnp.where(here, target, 0.0))


def streamed_statistics(
    rows: jax.Array, embedding: jax.Array, targets: jax.Array, softcap: float | None, vocab_chunk: int | None
) -> Statistics:
    """Statistics over the whole vocabulary, with the logits of `vocab_chunk` words (None: all) alive at a time."""

    def add_block(seen: Statistics, block: jax.Array, start: jax.Array | int) -> Statistics:
        new = statistics_of(logits_of(rows, block, softcap), targets - start)
        maximum = jnp.maximum(seen.maximum, new.maximum)
        total = seen.total * jnp.exp(seen.maximum - maximum) + new.total * jnp.exp(new.maximum - maximum)
        return Statistics(maximum, total, seen.target + new.target)

    zeros = jnp.zeros(targets.shape, jnp.float32)
    nothing = Statistics(jnp.full(targets.shape, jnp.finfo(jnp.float32).min), zeros, zeros)
    return fold_blocks(add_block, nothing, embedding, vocab_chunk)


def logit_gradient(logits: jax.Array, log_sum_exp: jax.Array, targets: jax.Array, softcap: float | None) -> jax.Array:
    """d nll / d (uncapped logit), float32 [N, v]: (softmax - one hot) times the slope of the soft cap."""
    is_target = lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[:, None]
    gradient = jnp.exp(logits - log_sum_exp[:, None]) - is_target
    return gradient if softcap is None else gradient * (1.0 - jnp.square(logits / softcap))


def project_back(d_logits: jax.Array, block: jax.Array) -> jax.Array:
    """Gradient of the rows, float32 [N, D], from that of their logits [N, v] over words [v, D]."""
    scale = _FLOAT16_SCALE if block.dtype == jnp.float16 else 1.0
    d_logits = (d_logits * scale).astype(block.dtype)
    return jnp.einsum("NV,VD->ND", d_logits, block, preferred_element_type=jnp.float32) / scale


def fold_blocks(add_block: Callable, carry, embedding: jax.Array, vocab_chunk: int | None):
    """Folds `add_block(carry, block [v, D], start)` over blocks of words, the last one as short as it comes."""
    vocab = embedding.shape[0]
    size = min(vocab_chunk or vocab, vocab)
    full, rest = divmod(vocab, size)
    if full == 1 and rest == 0:
        return add_block(carry, embedding, 0)

    def step(index, carry):
        return add_block(carry, lax.dynamic_slice_in_dim(embedding, index * size, size), index * size)

    carry = lax.fori_loop(0, full, step, carry)
    return add_block(carry, embedding[full * size :], full * size) if rest else carry
