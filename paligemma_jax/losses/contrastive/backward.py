"""One round around the ring that sums the loss and its gradients over all pairs. Axes as in pairs.py."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from paligemma_jax.losses.contrastive.pairs import LocalImages, PairLogits, TextBlock, pair_logits
from paligemma_jax.losses.contrastive.ring import Ring, fold_chunks, fold_ring, slice_chunk, update_chunk
from paligemma_jax.losses.vocab_projection import project_back
from paligemma_jax.models.numerics import materialized


class NeedsGrad(NamedTuple):
    """Which gradients the caller's differentiation needs; decided while tracing."""

    images: bool = False
    texts: bool = False
    log_scale: bool = False
    bias: bool = False


class Gradients(NamedTuple):
    """Float32 gradients of the loss; None if not needed."""

    images: jax.Array | None
    texts: jax.Array | None
    log_scale: jax.Array | None
    bias: jax.Array | None


class _Sums(NamedTuple):
    """Running float32 sums of the loss and of gradients over the pairs of one device; None if not needed."""

    loss: jax.Array
    images: jax.Array | None  # [b, D]
    log_scale: jax.Array | None
    bias: jax.Array | None


def gradient_round(
    ring: Ring, chunk_size: int, needs_grad: NeedsGrad, images: LocalImages, texts: TextBlock, columns, score: Callable
) -> tuple[jax.Array, Gradients]:
    """Returns the mean over all images of a loss over pairs, and its gradients.

    Args:
      ring: the devices.
      chunk_size: texts per chunk.
      needs_grad: the gradients to compute.
      images, texts: the arrays of this device.
      columns: arrays [t] that travel with the texts.
      score: `score(pairs, columns of the chunk) -> (loss, d_logits)`: the sum over the pairs, and its gradient, float32
        [b, c] between -1 and 1, since it is cast to the dtype of the embeddings.
    """

    def visit(sums: _Sums, block, origin):
        texts, columns = block
        d_texts = jnp.zeros(texts.vectors.shape, jnp.float32) if needs_grad.texts else None

        def step(carry, start, size):
            pairs = pair_logits(images, texts, origin, start, size)
            loss, d_logits = score(pairs, slice_chunk(columns, start, size))
            sums, d_texts = carry
            sums = _add_chunk(sums, loss, d_logits, pairs, images)
            # Both products read what the first one's epilogue computed, instead of computing it again from the logits.
            d_logits = materialized(d_logits.astype(images.vectors.dtype))
            if needs_grad.texts:
                d_texts = update_chunk(d_texts, project_back(d_logits.T, images.vectors), start)
            if sums.images is not None:
                d_images = project_back(d_logits, slice_chunk(texts.vectors, start, size))
                sums = sums._replace(images=sums.images + d_images)
            return sums, d_texts

        return fold_chunks(step, (sums, d_texts), texts.vectors.shape[0], chunk_size)

    zero = jnp.zeros((), jnp.float32)
    sums = _Sums(
        zero,
        jnp.zeros(images.vectors.shape, jnp.float32) if needs_grad.images else None,
        zero if needs_grad.log_scale else None,
        zero if needs_grad.bias else None,
    )
    sums, d_texts = fold_ring(ring, visit, _add, sums, (texts, columns))
    share = 1 / (images.vectors.shape[0] * ring.size)
    loss, d_log_scale, d_bias = jax.tree.map(
        lambda value: value * share, ring.total((sums.loss, sums.log_scale, sums.bias))
    )
    d_images, d_texts = jax.tree.map(lambda vectors: vectors * (images.scale * share), (sums.images, d_texts))
    return loss, Gradients(d_images, d_texts, d_log_scale, d_bias)


def _add_chunk(sums: _Sums, loss, d_logits, pairs: PairLogits, images: LocalImages) -> _Sums:
    """Adds the loss and the gradients of scale and bias of the pairs of all images and a chunk of texts."""
    _, d_images, d_log_scale, d_bias = sums
    if d_log_scale is not None:
        d_log_scale += (d_logits * (pairs.logits - images.bias)).sum()
    if d_bias is not None:
        d_bias += d_logits.sum()
    return _Sums(sums.loss + loss, d_images, d_log_scale, d_bias)


def _add(one, other):
    return jax.tree.map(jnp.add, one, other)
