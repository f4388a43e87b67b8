"""Pairs of this device's images with a chunk of texts: their logits, and which of them count.

Axes: B images and T texts of the global batch, b and t on one device, c texts of a chunk, D width of the embeddings,
K = T / B texts of each image: image i owns the texts [K * i, K * (i + 1)).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from paligemma_jax.contrastive_ring import Ring, take


class Images(NamedTuple):
    """What stays on a device."""

    vectors: jax.Array  # [b, D]
    scale: jax.Array  # float32, positive
    bias: jax.Array  # float32
    text_ids: jax.Array | None  # [b, K], of the texts that belong to each image
    mask: jax.Array | None  # bool [b, T]
    position: jax.Array | int  # of the device on the ring


class Texts(NamedTuple):
    """What travels."""

    vectors: jax.Array  # [t, D]
    ids: jax.Array | None  # [t]


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
    counted = None
    if chunk.ids is not None:  # a text that is the image's own in another row is no negative
        counted = positive | (images.text_ids[:, :, None] != chunk.ids[None, None, :]).all(axis=1)
    if images.mask is not None:
        mask = lax.dynamic_slice_in_dim(images.mask, first, size, axis=1)
        counted = mask if counted is None else counted & mask
    return Pairs(cosines * images.scale + images.bias, positive, counted)


def sides_of(ring: Ring, zimg, ztxt, scale, bias, text_ids, mask) -> tuple[Images, Texts]:
    """What stays on this device and what travels, from this device's rows."""
    own_ids = None if text_ids is None else text_ids.reshape(zimg.shape[0], -1)
    return Images(zimg, scale, bias, own_ids, mask, ring.position()), Texts(ztxt, text_ids)
