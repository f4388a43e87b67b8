"""Attention masks: dense ones, and prefix-LM masks stored by token, which flash attention needs."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int


class TokenMask(NamedTuple):
    """A mask of a few integers per token: a query attends to a range of the keys of its segment.

    In `first <= key index <= last` a causal token has its own index as `last`, and a token of a bidirectional block the
    block's last index. With an image of two patches, a prompt of one token and an answer of two, twice in one row:

      segment   1 1 1 1 1  2 2 2 2 2  0
      last      2 2 2 3 4  7 7 7 8 9  10

    Attributes:
      segment: the example that a token belongs to, from 1; 0 is padding, which no other token attends to. Segments may
        interleave.
      last: index of the last visible key.
      first: index of the first visible key; None is 0, as without a sliding window.
    """

    segment: Int[Array, "B T"]
    last: Int[Array, "B T"]
    first: Int[Array, "B T"] | None = None

    def dense(self) -> Bool[Array, "B T T"]:
        """Returns the mask of every query and key; padding neither attends nor is attended to."""
        real = (self.segment > 0)[:, None, :]
        return self._in_range() & real

    def windowed(self, positions: Int[Array, "B T"], window: int) -> "TokenMask":
        """Returns the mask with a sliding window, see gemma.sliding_mask; positions grow within a segment."""
        near = positions[:, :, None] - positions[:, None, :] < window
        own_block = self.last[:, None, :] >= jnp.arange(self.length)[None, :, None]
        keys = jnp.arange(self.length)[None, None]
        first = jnp.min(jnp.where(self._in_range() & (near | own_block), keys, self.length), axis=2)
        return self._replace(first=first.astype(jnp.int32))

    @property
    def length(self) -> int:
        """T, the number of tokens."""
        return self.segment.shape[1]

    def _in_range(self) -> Bool[Array, "B T T"]:
        """Returns which keys of its segment a query sees; padding is a segment of its own."""
        keys = jnp.arange(self.length)[None, None]
        visible = (self.segment[:, :, None] == self.segment[:, None, :]) & (keys <= self.last[:, :, None])
        return visible if self.first is None else visible & (keys >= self.first[:, :, None])


def block_mask(mask_input: Bool[Array, "B T"], mask_ar: Int[Array, "B T"]) -> TokenMask:
    """Returns the mask that `prefix_mask` describes, stored by token."""
    index = jnp.arange(mask_ar.shape[1], dtype=jnp.int32)[None]
    starts = jnp.where(mask_ar[:, 1:] == 1, index[:, 1:], mask_ar.shape[1])  # of the blocks after the first token
    ends = jnp.pad(lax.cummin(starts, axis=1, reverse=True), ((0, 0), (0, 1)), constant_values=mask_ar.shape[1]) - 1
    return TokenMask(mask_input.astype(jnp.int32), ends)


def prefix_lm_mask(segment: Int[Array, "B T"], prefix: Bool[Array, "B T"]) -> TokenMask:
    """Returns the mask of packed prefix-LM examples, each with a bidirectional prefix and a causal suffix.

    Args:
      segment: see TokenMask.
      prefix: True on the tokens of a prefix, which precede those of its suffix.
    """
    index = jnp.arange(segment.shape[1], dtype=jnp.int32)
    same = segment[:, :, None] == segment[:, None, :]
    end = jnp.max(jnp.where(same & prefix[:, None, :], index[None, None], 0), axis=2)
    return TokenMask(segment, jnp.maximum(end, index[None]))


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
    return block_mask(mask_input, mask_ar).dense()


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
