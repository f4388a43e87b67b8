"""The sigmoid and the softmax loss of pairs, and their gradients with respect to logits, on one device of a ring.

Axes as in pairs.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from paligemma_jax.losses.contrastive.backward import Gradients, NeedsGrad, gradient_round
from paligemma_jax.losses.contrastive.pairs import Images, Pairs, Texts, pairs_of
from paligemma_jax.losses.contrastive.ring import Ring, fold_chunks, fold_ring, put


def sigmoid_on_device(
    ring: Ring, chunk_size: int, needs_grad: NeedsGrad, images: Images, texts: Texts
) -> tuple[jax.Array, Gradients]:
    """Loss and gradients, in one round."""
    return gradient_round(ring, chunk_size, needs_grad, images, texts, (), _sigmoid)


def _sigmoid(pairs: Pairs, _columns) -> tuple[jax.Array, jax.Array]:
    against = jnp.where(pairs.positive, -pairs.logits, pairs.logits)  # the loss is log(1 + exp(against))
    small = jnp.exp(-jnp.abs(against))
    loss = jnp.maximum(against, 0.0) + jnp.log1p(small)
    slope = jnp.where(against >= 0, 1.0, small) / (1.0 + small)  # sigmoid(against)
    d_logits = jnp.where(pairs.positive, -slope, slope)
    return pairs.where_counted(loss).sum(), pairs.where_counted(d_logits)


class _Statistics(NamedTuple):
    """Of every image over the texts seen, or of every text over the images; float32."""

    log_sum_exp: jax.Array  # -inf where no pair counted
    weight: jax.Array  # of the targets that counted; 1 if all did
    target: jax.Array  # weighted sum of their logits

    def cross_entropy(self) -> jax.Array:
        """0 where no target counted."""
        return jnp.where(self.weight > 0, self.weight * self.log_sum_exp - self.target, 0.0)


def softmax_on_device(
    ring: Ring, chunk_size: int, needs_grad: NeedsGrad, images: Images, texts: Texts
) -> tuple[jax.Array, Gradients]:
    """Loss and gradients: a round for the log-sum-exps, and another for the gradients if any is needs_grad."""
    by_image, by_text = _statistics_round(ring, chunk_size, images, texts)
    loss = 0.5 * (by_image.cross_entropy().sum() + by_text.cross_entropy().sum())
    share = 1 / (images.vectors.shape[0] * ring.size)
    loss = ring.total(loss) * share
    if not any(needs_grad):
        return loss, Gradients(None, None, None, None)

    def score(pairs: Pairs, by_text: _Statistics) -> tuple[jax.Array, jax.Array]:
        over_texts = jnp.exp(pairs.logits - by_image.log_sum_exp[:, None]) * by_image.weight[:, None]
        over_images = jnp.exp(pairs.logits - by_text.log_sum_exp[None, :]) * by_text.weight[None, :]
        target = jnp.where(pairs.positive, _target_weight(images, texts), 0.0)
        return jnp.zeros((), jnp.float32), pairs.where_counted(0.5 * (over_texts + over_images) - target)

    _, gradients = gradient_round(ring, chunk_size, needs_grad, images, texts, by_text, score)
    return loss, gradients


def _target_weight(images: Images, texts: Texts) -> float:
    """1 / K: an image's K texts share it, and so do the K rows of texts that belong to it."""
    return images.vectors.shape[0] / texts.vectors.shape[0]


def _statistics_round(ring: Ring, chunk_size: int, images: Images, texts: Texts) -> tuple[_Statistics, _Statistics]:
    """Of this device's images over all texts, and of this device's texts over all images."""
    weight = _target_weight(images, texts)

    def visit(by_image: _Statistics, block: Texts, origin):
        def step(carry, start, size):
            by_image, by_text = carry
            pairs = pairs_of(images, block, origin, start, size)
            return _merge(by_image, _statistics(pairs, weight, 1)), put(by_text, _statistics(pairs, weight, 0), start)

        return fold_chunks(step, (by_image, _nothing(block)), block.vectors.shape[0], chunk_size)

    return fold_ring(ring, visit, _merge, _nothing(images), texts)


def _nothing(side: Images | Texts) -> _Statistics:
    zeros = jnp.zeros(side.vectors.shape[0], jnp.float32)
    return _Statistics(jnp.full_like(zeros, -jnp.inf), zeros, zeros)


def _statistics(pairs: Pairs, weight: float, axis: int) -> _Statistics:
    target = pairs.where_counted(jnp.where(pairs.positive, weight, 0.0))
    logits = pairs.where_counted(pairs.logits, -jnp.inf)
    target_logits = jnp.where(target > 0, weight * logits, 0.0)
    return _Statistics(jax.nn.logsumexp(logits, axis), target.sum(axis), target_logits.sum(axis))


def _merge(one: _Statistics, other: _Statistics) -> _Statistics:
    return _Statistics(
        jnp.logaddexp(one.log_sum_exp, other.log_sum_exp), one.weight + other.weight, one.target + other.target
    )
