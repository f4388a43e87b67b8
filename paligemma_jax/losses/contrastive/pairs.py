"""Pairs of this device's images with a chunk of texts: their logits, and the mask of those that count.

Axes: B images and T texts of the global batch, b and t on one device, c texts of a chunk, D width of the embeddings,
K = T / B texts of each image: image i owns the texts [K * i, K * (i + 1)).
"""

import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax

from paligemma_jax.losses.contrastive.ring import Ring, slice_chunk


class PairMask(NamedTuple):
    """The arguments of `losses.sigmoid_loss` that determine which pairs count; None imposes no condition."""

    mask: jax.Array | None = None  # bool [B, T]
    text_ids: jax.Array | None = None  # [T]
    image_ids: jax.Array | None = None  # [B]
    valid: jax.Array | None = None  # bool [B]


class LocalImages(NamedTuple):
    """The arrays of the images, which stay on their device."""

    vectors: jax.Array  # [b, D]
    scale: jax.Array  # float32, positive
    bias: jax.Array  # float32
    position: jax.Array | int  # of the device on the ring
    mask: jax.Array | None  # bool [b, T]
    text_ids: jax.Array | None  # [b, K], of the texts that belong to each image
    ids: jax.Array | None  # [b]
    valid: jax.Array | None  # bool [b]


class TextBlock(NamedTuple):
    """The arrays of one device's texts, which travel around the ring."""

    vectors: jax.Array  # [t, D]
    ids: jax.Array | None  # [t]
    image_ids: jax.Array | None  # [t], of the images they belong to
    valid: jax.Array | None  # bool [t], of the images they belong to


class PairLogits(NamedTuple):
    """The pairs of a device's images with a chunk of texts."""

    logits: jax.Array  # float32 [b, c]
    positive: jax.Array  # bool [b, c], whether the text belongs to the image
    mask: jax.Array | None  # bool [b, c], the pairs that count; None means all

    def masked(self, values: jax.Array, fill: float = 0.0) -> jax.Array:
        """Returns `values` with `fill` at the pairs that do not count."""
        return values if self.mask is None else jnp.where(self.mask, values, fill)


def pair_logits(
    images: LocalImages, texts: TextBlock, origin: jax.Array | int, start: jax.Array | int, size: int
) -> PairLogits:
    """Pairs all images with the texts [start, start + size) of the block that belongs to the device at `origin`."""
    chunk = cast(TextBlock, slice_chunk(texts, start, size))
    cosines = jnp.einsum("bD,cD->bc", images.vectors, chunk.vectors, preferred_element_type=jnp.float32)
    rows, columns = images.vectors.shape[0], texts.vectors.shape[0]
    first = origin * columns + start
    image = images.position * rows + lax.broadcasted_iota(jnp.int32, cosines.shape, 0)
    owner = (first + lax.broadcasted_iota(jnp.int32, cosines.shape, 1)) // (columns // rows)
    positive = image == owner
    conditions = []
    if images.text_ids is not None and chunk.ids is not None:  # another row's text that equals one of the image's own
        conditions.append(positive | (images.text_ids[:, :, None] != chunk.ids[None, None, :]).all(axis=1))
    if images.ids is not None and chunk.image_ids is not None:  # a text of an equal image
        conditions.append(positive | (images.ids[:, None] != chunk.image_ids[None, :]))
    if images.valid is not None and chunk.valid is not None:
        conditions.append(images.valid[:, None] & chunk.valid[None, :])
    if images.mask is not None:
        conditions.append(lax.dynamic_slice_in_dim(images.mask, first, size, axis=1))
    mask = functools.reduce(jnp.logical_and, conditions) if conditions else None
    return PairLogits(cosines * images.scale + images.bias, positive, mask)


def local_arrays(ring: Ring, zimg, ztxt, scale, bias, pair_mask: PairMask) -> tuple[LocalImages, TextBlock]:
    """Returns the images and the texts of this device from its rows of the arguments."""
    mask, text_ids, image_ids, valid = pair_mask
    rows = zimg.shape[0]

    def repeat(array):
        return None if array is None else jnp.repeat(array, ztxt.shape[0] // rows)

    own_text_ids = None if text_ids is None else text_ids.reshape(rows, -1)
    texts = TextBlock(ztxt, text_ids, repeat(image_ids), repeat(valid))
    return LocalImages(zimg, scale, bias, ring.position(), mask, own_text_ids, image_ids, valid), texts
