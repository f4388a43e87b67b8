"""One round of the ring in which every pair's logit gives its part of the loss and of the gradients.

Axes as in pairs.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from paligemma_jax.losses.contrastive.pairs import Images, Pairs, Texts, pairs_of
from paligemma_jax.losses.contrastive.ring import Ring, fold_chunks, fold_ring, put, take
from paligemma_jax.losses.vocab_projection import project_back


class NeedsGrad(NamedTuple):
    """Which gradients the caller's differentiation needs; decided while tracing."""

    images: bool = False
    texts: bool = False
    log_scale: bool = False
    bias: bool = False


class Gradients(NamedTuple):
    """Float32, of the arguments of the same names; None where it is not needs_grad."""

    images: jax.Array | None
    texts: jax.Array | None
    log_scale: jax.Array | None
    bias: jax.Array | None


class _Kept(NamedTuple):
    """Sums over the pairs seen so far by one device, float32; None where it is not needs_grad."""

    loss: jax.Array
    images: jax.Array | None  # [b, D]
    log_scale: jax.Array | None
    bias: jax.Array | None


def gradient_round(
    ring: Ring, chunk_size: int, needs_grad: NeedsGrad, images: Images, texts: Texts, columns, score: Callable
) -> tuple[jax.Array, Gradients]:
    """The mean over all images of a loss over pairs, and its gradients.

    Args:
      ring, chunk_size, needs_grad: as everywhere here.
      images, texts: of this device.
      columns: arrays [t] that travel with the texts.
      score: `score(pairs, columns of the chunk) -> (loss, d_logits)`: the sum over the pairs, and float32 [b, c] of
        numbers between -1 and 1, as these are cast to the type of the embeddings.
    """

    def visit(kept: _Kept, block, origin):
        texts, columns = block
        d_texts = jnp.zeros(texts.vectors.shape, jnp.float32) if needs_grad.texts else None

        def step(carry, start, size):
            pairs = pairs_of(images, texts, origin, start, size)
            loss, d_logits = score(pairs, take(columns, start, size))
            kept, d_texts = carry
            if needs_grad.texts:
                d_texts = put(d_texts, project_back(d_logits.T, images.vectors), start)
            return _add(kept, loss, d_logits, pairs, images, take(texts.vectors, start, size)), d_texts

        return fold_chunks(step, (kept, d_texts), texts.vectors.shape[0], chunk_size)

    zero = jnp.zeros((), jnp.float32)
    kept = _Kept(
        zero,
        jnp.zeros(images.vectors.shape, jnp.float32) if needs_grad.images else None,
        zero if needs_grad.log_scale else None,
        zero if needs_grad.bias else None,
    )
    kept, d_texts = fold_ring(ring, visit, _sum, kept, (texts, columns))
    share = 1 / (images.vectors.shape[0] * ring.size)
    loss, d_log_scale, d_bias = jax.tree.map(
        lambda value: value * share, ring.total((kept.loss, kept.log_scale, kept.bias))
    )
    d_images, d_texts = jax.tree.map(lambda vectors: vectors * (images.scale * share), (kept.images, d_texts))
    return loss, Gradients(d_images, d_texts, d_log_scale, d_bias)


def _add(kept: _Kept, loss, d_logits, pairs: Pairs, images: Images, vectors) -> _Kept:
    """Adds a chunk of texts `vectors` [c, D]."""
    _, d_images, d_log_scale, d_bias = kept
    if d_images is not None:
        d_images += project_back(d_logits, vectors)
    if d_log_scale is not None:
        d_log_scale += (d_logits * (pairs.logits - images.bias)).sum()
    if d_bias is not None:
        d_bias += d_logits.sum()
    return _Kept(kept.loss + loss, d_images, d_log_scale, d_bias)


def _sum(one, other):
    return jax.tree.map(jnp.add, one, other)
