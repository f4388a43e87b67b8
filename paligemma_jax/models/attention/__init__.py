"""Rotary positions, attention masks, and attention by one of several kernels (dispatch.py). Axes: see models."""

from paligemma_jax.models.attention.dispatch import KERNELS, attention, has_flash, has_short, short_attention
from paligemma_jax.models.attention.masks import TokenMask, block_mask, packed_mask, prefix_lm_mask, prefix_mask
from paligemma_jax.models.attention.positions import rotary

__all__ = [
    "KERNELS",
    "TokenMask",
    "attention",
    "block_mask",
    "has_flash",
    "has_short",
    "packed_mask",
    "prefix_lm_mask",
    "prefix_mask",
    "rotary",
    "short_attention",
]
