"""Pairs of this device's images with a chunk of texts: their logits, and which of them count.

Axes: B images and T texts of the global batch, b and t on one device, c texts of a chunk, D width of the embeddings,
K = T / B texts of each image: image i owns the texts [K * i, K * (i + 1)).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from paligemma_jax.losses.contrastive.ring import Ring, take


class PairMask(NamedTuple):
    """What decides which pairs count; see the arguments of `losses.sigmoid_loss`. None: all do."""

    mask: jax.Array | None = None  # bool [B, T]
    text_ids: jax.Array | None = None  # [T]
    image_ids: jax.Array | None = None  # [B]
    valid: jax.Array | None = None  # bool [B]


class Images(NamedTuple):
    """What stays on a device."""

    vectors: jax.Array  # [b, D]
    scale: jax.Array  # float32, positive
    bias: jax.Array  # float32
    position: jax.Array | int  # of the device on the ring
    mask: jax.Array | None  # bool [b, T]
    text_ids: jax.Array | None  # [b, K], of the texts that belong to each image
    ids: jax.Array | None  # [b]
    valid: jax.Array | None  # bool [b]


class Texts(NamedTuple):
    """What travels."""

    vectors: jax.Array  # [t, D]
    ids: jax.Array | None  # [t]
    image_ids: jax.Array | None  # [t], of the images they belong to
    valid: jax.Array | None  # bool [t], likewise


class Pairs(NamedTuple):
    """Images with a chunk of texts."""

    logits: jax.Array  # float32 [b, c]
    positive: jax.Array  # bool [b, c]: the text belongs to the image
    counted: jax.Array | None  # bool [b, c]; None: all

    def where_counted(self, values: jax.Array, otherwise: float = 0.0) -> jax.Array:
        return values if self.counted is None else jnp.where(self.counted, values, otherwise)


def pairs_of(images: Images, texts: Texts, origin: jax.Array | int, start: jax.Array | int, size: int) -> Pairs:
    """All images with the texts [start, start + size) of the block that comes from the device at `origin`."""
    chunk = take(texts, start, size)
    cosines = jnp.einsum("bD,cD->bc", images.vectors, chunk.vectors, preferred_element_type=jnp.float32)
    rows, columns = images.vectors.shape[0], texts.vectors.shape[0]
    first = origin * columns + start
    image = images.position * rows + lax.broadcasted_iota(jnp.int32, cosines.shape, 0)
    owner = (first + lax.broadcasted_iota(jnp.int32, cosines.shape, 1)) // (columns // rows)
    positive = image == owner
    found = []
    if chunk.ids is not None:  # a text that is the image's own in another row is no negative
        found.append(positive | (images.text_ids[:, :, None] != chunk.ids[None, None, :]).all(axis=1))
    if chunk.image_ids is not None:  # nor is another text of the very same image
        found.append(positive | (images.ids[:, None] != chunk.image_ids[None, :]))
    if chunk.valid is not None:
        found.append(images.valid[:, None] & chunk.valid[None, :])
    if images.mask is not None:
        found.append(lax.dynamic_slice_in_dim(images.mask, first, size, axis=1))
    counted = functools.reduce(jnp.logical_and, found) if found else None
    return Pairs(cosines * images.scale + images.bias, positive, counted)


def sides_of(ring: Ring, zimg, ztxt, scale, bias, pair_mask: PairMask) -> tuple[Images, Texts]:
    """What stays on this device and what travels, from this device's rows."""
    mask, text_ids, image_ids, valid = pair_mask
    rows = zimg.shape[0]
    own_ids = None if text_ids is None else text_ids.reshape(rows, -1)
    of_texts = [None if array is None else jnp.repeat(array, ztxt.shape[0] // rows) for array in (image_ids, valid)]
    images = Images(zimg, scale, bias, ring.position(), mask, own_ids, image_ids, valid)
    return images, Texts(ztxt, text_ids, *of_texts)
