"""Rotary positions, masked grouped-query attention and attention masks. Axes: see models."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from paligemma_jax.models.numerics import soft_cap


def rotary(x: Float[Array, "B T N H"], positions: Int[Array, "B T"], theta: float) -> Float[Array, "B T N H"]:
    """Applies rotary position embeddings (Su et al. 2021); entries i and i + H/2 form a pair, as in Gemma."""
    half = x.shape[-1] // 2
    timescale = theta ** (jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) / timescale[None, None, None]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"] | None,
    *,
    scale: float,
    cap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention with float32 scores and softmax.

    Args:
      q, k, v: in the compute dtype; N is a multiple of K, query head n uses key/value head n // (N / K).
      mask: True where query t attends to key s; None attends to all keys. A query without keys returns the mean of v.
      scale: factor on the scores, usually H ** -0.5.
      cap: soft cap on the scaled scores (Gemma 2), applied before the mask.
    """
    B, T, N, H = q.shape
    K, S = k.shape[2], k.shape[1]
    G = N // K
    # Query heads that share keys become rows of one matrix: fewer and larger products, which are faster on CPU.
    q = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("BKQH,BKSH->BKQS", q, k, preferred_element_type=jnp.float32)
    scores = soft_cap(scores * scale, cap).reshape(B, K, G, T, S)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, -2.3819763e38)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(B, K, G * T, S)
    out = jnp.einsum("BKQS,BKSH->BKQH", weights, v)
    return out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def prefix_mask(mask_input: Bool[Array, "B S"], mask_ar: Int[Array, "B S"]) -> Bool[Array, "B S S"]:
    """Returns a prefix-LM attention mask: query i attends to key j iff block(j) <= block(i) and both are real tokens.

    As in big_vision, `mask_ar` is 1 where a token starts a new block and 0 where it belongs to the previous token's:

      mask_ar  1 1 1 1 1 1   causal
      mask_ar  0 0 0 1 1 1   a bidirectional prefix of three tokens, then causal
      mask_ar  1 0 1 0 1 0   blocks of two tokens, causal between blocks

    Args:
      mask_input: True on real tokens, False on padding, which may be on either side.
      mask_ar: 0 or 1 as above.
    """
    block = jnp.cumsum(mask_ar.astype(jnp.int32), axis=1)
    visible = block[:, None, :] <= block[:, :, None]
    return visible & mask_input[:, None, :] & mask_input[:, :, None]


def packed_mask(segment: Int[Array, "B T"], suffix: Int[Array, "B T"], num_patches: int) -> Bool[Array, "B S S"]:
    """Returns the attention mask of several texts packed behind one image, S = num_patches + T.

    Patches attend to patches; a text attends to the patches and, with a prefix-LM mask, to itself.

    Args:
      segment: index of the text that a token belongs to, from 1; 0 is padding, which no token attends to.
      suffix: 1 on the causal tokens of a suffix, 0 on those of a prefix.
      num_patches: P.
    """
    B, T = segment.shape
    position = jnp.arange(T)
    same_text = (segment[:, :, None] == segment[:, None, :]) & (segment[:, None, :] > 0)
    visible = (position[None, :] <= position[:, None])[None] | (suffix[:, None, :] == 0)
    text_to_text = same_text & visible
    image_to_image, image_to_text = jnp.ones((B, num_patches, num_patches), bool), jnp.zeros((B, num_patches, T), bool)
    image_rows = jnp.concatenate([image_to_image, image_to_text], 2)
    text_rows = jnp.concatenate([jnp.ones((B, T, num_patches), bool), text_to_text], 2)
    return jnp.concatenate([image_rows, text_rows], 1)
