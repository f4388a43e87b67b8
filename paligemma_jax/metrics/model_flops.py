"""Model FLOPs of a PaliGemma step, for model FLOPs utilisation (MFU, Chowdhery et al. 2022, appendix B).

Only work that the model needs is counted: real tokens, not padding; one forward pass, not its recomputation; logits of
supervised tokens. Products of weights are counted, attention scores are not.
"""

from typing import NamedTuple

from paligemma_jax.models.gemma import GemmaConfig
from paligemma_jax.models.paligemma import PaliGemmaConfig
from paligemma_jax.models.vit import ViTConfig


class Passes(NamedTuple):
    """FLOPs per weight and token of each part.

    The forward pass takes 2, the gradient of the activations 2, and the gradient of the weights 2.
    """

    tower: int
    decoder: int
    logits: int


FORWARD = Passes(2, 2, 2)
LORA = Passes(2, 4, 4)
"""Adapters in the decoder: its frozen weights have no gradient, and the tower none at all."""
FULL = Passes(6, 6, 6)


def tower_weights(config: ViTConfig) -> int:
    """Returns the number of weights of the blocks and the patch embedding."""
    block = 4 * config.width**2 + 2 * config.width * config.mlp_dim
    return config.depth * block + 3 * config.patch_size**2 * config.width


def decoder_weights(config: GemmaConfig) -> int:
    """Returns the number of weights of the blocks; the embedding is counted by its supervised tokens."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    return config.depth * config.width * (heads * config.head_dim + 3 * config.mlp_dim)


def model_flops(config: PaliGemmaConfig, images: int, text_tokens: int, supervised: int, passes: Passes) -> int:
    """Returns the model FLOPs of a step.

    Args:
      config: sizes of the model.
      images: number of images.
      text_tokens: number of tokens of all texts, without padding.
      supervised: number of tokens whose logits the loss reads.
      passes: what is computed for each weight, `LORA` or `FULL`.
    """
    vision, decoder = config.vision, config.decoder
    image_tokens = images * (vision.image_size // vision.patch_size) ** 2
    projector = vision.width * decoder.width
    return (
        passes.tower * tower_weights(vision) * image_tokens
        + passes.decoder * (projector * image_tokens + decoder_weights(decoder) * (image_tokens + text_tokens))
        + passes.logits * decoder.vocab_size * decoder.width * supervised
    )
