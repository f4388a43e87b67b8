"""Pooling of a vision tower's features to one vector per image. Axes: see models."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from paligemma_jax.models import encoder_block
from paligemma_jax.models.norms import LayerNorm
from paligemma_jax.models.vit import ViTConfig
from train_jax.core import row_sharding

IMAGE_POOLINGS = ("map", "gap", "class")


class MAPHead(nnx.Module):
    """Attention pooling (Lee et al. 2019, Zhai et al. 2022): a learned query attends to all patches, then an MLP."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        probe = jax.random.normal(rngs.params(), (config.width,)) * config.width**-0.5
        self.probe = nnx.Param(probe.astype(config.param_dtype))
        self.attention = encoder_block.EncoderAttention(config, "image_head", rngs=rngs)
        self.layernorm = LayerNorm(config.width, eps=config.eps, param_dtype=config.param_dtype)
        self.mlp = encoder_block.EncoderMlp(config, "image_head", rngs=rngs)

    def __call__(self, x: Float[Array, "B P D"], dropout_keys=None) -> Float[Array, "B D"]:
        """Returns one float32 vector per image."""
        return row_sharding.apply_block(self, x, dropout_keys, call=MAPHead._pooled)

    def _pooled(self, x: Float[Array, "B P D"], dropout_keys) -> Float[Array, "B D"]:
        probe = self.probe[...].astype(jnp.float32)
        if self.attention.has_plain_kernels:
            pooled = self.attention.pool(probe, x)
        else:
            query = jnp.broadcast_to(probe, (len(x), 1, x.shape[-1]))
            pooled = self.attention(query, dropout_keys, keys_from=x)
        return (pooled + self.mlp(self.layernorm(pooled), dropout_keys))[:, 0]
