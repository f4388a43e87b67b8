"""The sigmoid and the softmax loss and their gradients, as computed by one device of a ring. Axes as in pairs.py."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from paligemma_jax.losses.contrastive.backward import Gradients, NeedsGrad, gradient_round
from paligemma_jax.losses.contrastive.pairs import LocalImages, PairLogits, TextBlock, pair_logits
from paligemma_jax.losses.contrastive.ring import Ring, fold_chunks, fold_ring, update_chunk


def sigmoid_on_device(
    ring: Ring, chunk_size: int, needs_grad: NeedsGrad, images: LocalImages, texts: TextBlock
) -> tuple[jax.Array, Gradients]:
    """Returns the sigmoid loss and its gradients, computed in one round."""
    return gradient_round(ring, chunk_size, needs_grad, images, texts, (), _sigmoid)


def _sigmoid(pairs: PairLogits, _columns) -> tuple[jax.Array, jax.Array]:
    signed = jnp.where(pairs.positive, -pairs.logits, pairs.logits)  # the loss is log(1 + exp(signed))
    exp = jnp.exp(-jnp.abs(signed))
    loss = jnp.maximum(signed, 0.0) + jnp.log1p(exp)
    slope = jnp.where(signed >= 0, 1.0, exp) / (1.0 + exp)  # sigmoid(signed)
    d_logits = jnp.where(pairs.positive, -slope, slope)
    return pairs.masked(loss).sum(), pairs.masked(d_logits)


class _SoftmaxStatistics(NamedTuple):
    """Running float32 statistics of every image over the texts, or of every text over the images."""

    log_sum_exp: jax.Array  # -inf if no pair counts
    weight: jax.Array  # of the targets that count; 1 if all do
    target: jax.Array  # weighted sum of their logits

    def cross_entropy(self) -> jax.Array:
        """Returns the cross entropy, 0 if no target counts."""
        return jnp.where(self.weight > 0, self.weight * self.log_sum_exp - self.target, 0.0)


def softmax_on_device(
    ring: Ring, chunk_size: int, needs_grad: NeedsGrad, images: LocalImages, texts: TextBlock
) -> tuple[jax.Array, Gradients]:
    """Returns the softmax loss and its gradients: a round for log-sum-exps, and one for gradients if any is needed."""
    by_image, by_text = _statistics_round(ring, chunk_size, images, texts)
    loss = 0.5 * (by_image.cross_entropy().sum() + by_text.cross_entropy().sum())
    share = 1 / (images.vectors.shape[0] * ring.size)
    loss = ring.total(loss) * share
    if not any(needs_grad):
        return loss, Gradients(None, None, None, None)

    def score(pairs: PairLogits, by_text: _SoftmaxStatistics) -> tuple[jax.Array, jax.Array]:
        over_texts = jnp.exp(pairs.logits - by_image.log_sum_exp[:, None]) * by_image.weight[:, None]
        over_images = jnp.exp(pairs.logits - by_text.log_sum_exp[None, :]) * by_text.weight[None, :]
        target = jnp.where(pairs.positive, _target_weight(images, texts), 0.0)
        return jnp.zeros((), jnp.float32), pairs.masked(0.5 * (over_texts + over_images) - target)

    _, gradients = gradient_round(ring, chunk_size, needs_grad, images, texts, by_text, score)
    return loss, gradients


def _target_weight(images: LocalImages, texts: TextBlock) -> float:
    """Returns 1 / K, the weight of each of an image's K texts as a target."""
    return images.vectors.shape[0] / texts.vectors.shape[0]


def _statistics_round(
    ring: Ring, chunk_size: int, images: LocalImages, texts: TextBlock
) -> tuple[_SoftmaxStatistics, _SoftmaxStatistics]:
    """Returns the statistics of this device's images over all texts, and of its texts over all images."""
    weight = _target_weight(images, texts)

    def visit(by_image: _SoftmaxStatistics, block: TextBlock, origin):
        def step(carry, start, size):
            by_image, by_text = carry
            pairs = pair_logits(images, block, origin, start, size)
            by_image = _merge(by_image, _statistics(pairs, weight, 1))
            return by_image, update_chunk(by_text, _statistics(pairs, weight, 0), start)

        return fold_chunks(step, (by_image, _empty_statistics(block)), block.vectors.shape[0], chunk_size)

    return fold_ring(ring, visit, _merge, _empty_statistics(images), texts)


def _empty_statistics(rows: LocalImages | TextBlock) -> _SoftmaxStatistics:
    zeros = jnp.zeros(rows.vectors.shape[0], jnp.float32)
    return _SoftmaxStatistics(jnp.full_like(zeros, -jnp.inf), zeros, zeros)


def _statistics(pairs: PairLogits, weight: float, axis: int) -> _SoftmaxStatistics:
    target = pairs.masked(jnp.where(pairs.positive, weight, 0.0))
    logits = pairs.masked(pairs.logits, -jnp.inf)
    target_logits = jnp.where(target > 0, weight * logits, 0.0)
    return _SoftmaxStatistics(jax.nn.logsumexp(logits, axis), target.sum(axis), target_logits.sum(axis))


def _merge(one: _SoftmaxStatistics, other: _SoftmaxStatistics) -> _SoftmaxStatistics:
    return _SoftmaxStatistics(
        jnp.logaddexp(one.log_sum_exp, other.log_sum_exp), one.weight + other.weight, one.target + other.target
    )
