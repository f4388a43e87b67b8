"""Configs of the released dual encoders, by name."""

import math
from typing import TypedDict

from paligemma_jax.images.preprocessing import Preprocessing
from paligemma_jax.models.dual_encoder import DualEncoderConfig
from paligemma_jax.models.text_encoder import TextConfig
from paligemma_jax.models.vit import ViTConfig

TINY = "tiny"
MINI = "mini"  # "tiny" with a smaller text tower, for sweeps with a locked image tower


class TowerSizes(TypedDict):
    """Fields that ViTConfig and TextConfig share."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int


B = TowerSizes(width=768, depth=12, mlp_dim=3072, num_heads=12)
L = TowerSizes(width=1024, depth=24, mlp_dim=4096, num_heads=16)
SO400M = TowerSizes(width=1152, depth=27, mlp_dim=4304, num_heads=16)

# Patch size, sizes of both towers, and image sizes.
SIGLIP = {
    "siglip-b16": (16, B, (224, 256, 384, 512)),
    "siglip-l16": (16, L, (256, 384)),
    "siglip-so400m14": (14, SO400M, (224, 384)),
    "siglip2-b16": (16, B, (224, 256, 384, 512)),
    "siglip2-l16": (16, L, (256, 384, 512)),
    "siglip2-so400m14": (14, SO400M, (224, 384)),
    "siglip2-so400m16": (16, SO400M, (256, 384, 512)),
}
# Patch size, sizes of the vision tower, width and heads of the text tower, and image sizes.
CLIP = {
    "clip-b32": (32, B, (512, 8), (224,)),
    "clip-b16": (16, B, (512, 8), (224,)),
    "clip-l14": (14, L, (768, 12), (224, 336)),
}
NAMES = (TINY, MINI, *(f"{name}-{size}" for table in (SIGLIP, CLIP) for name, row in table.items() for size in row[-1]))


def variant(name: str) -> DualEncoderConfig:
    """Returns a config by name: "tiny", "siglip-b16-224", "siglip2-so400m14-384", "clip-l14-336" etc. (`NAMES`).

    "tiny" (or "siglip-tiny") has the vision tower and the vocabulary of the tiny PaliGemma, so that PaliGemma can start
    from its vision tower; "mini" has a smaller text tower.

    Raises:
      ValueError: an unknown name.
    """
    if name == f"siglip-{TINY}":
        name = TINY
    if name not in NAMES:
        raise ValueError(f"variant {name!r} is unknown, expected one of {', '.join(NAMES)}.")
    if name in (TINY, MINI):
        return DualEncoderConfig(
            vision=ViTConfig(96, 12, 128, 4, 512, 4, posemb="sincos2d"),
            text=TextConfig(1792, 64, 128, 3, 512, 4) if name == TINY else TextConfig(1792, 64, 48, 1, 128, 2),
            embed_dim=128,
            preprocessing=Preprocessing.siglip(96),
        )
    family, _, pixels = name.rpartition("-")
    return (_clip if family in CLIP else _siglip)(family, int(pixels))


def _siglip(family: str, pixels: int) -> DualEncoderConfig:
    patch, sizes, _ = SIGLIP[family]
    vocab_size = 256_000 if family.startswith("siglip2") else 32_000
    # SigLIP So400m/14 at 224 pixels was trained on texts of 16 tokens.
    length = 16 if (family, pixels) == ("siglip-so400m14", 224) else 64
    return DualEncoderConfig(
        vision=ViTConfig(pixels, patch, **sizes),
        text=TextConfig(vocab_size, length, **sizes),
        embed_dim=sizes["width"],
        preprocessing=Preprocessing.siglip(pixels),
    )


def _clip(family: str, pixels: int) -> DualEncoderConfig:
    patch, sizes, (width, heads), _ = CLIP[family]
    eps, activation = 1e-5, "quick_gelu"
    return DualEncoderConfig(
        vision=ViTConfig(pixels, patch, **sizes, eps=eps, activation=activation, class_token=True),
        text=TextConfig(
            49_408, 77, width, 12, 4 * width, heads, eps, activation, causal=True, pool="eos", eos_token=49_407
        ),
        embed_dim=width,
        pool="class",
        image_projection=True,
        projection_bias=False,
        initial_scale=math.log(1 / 0.07),
        initial_bias=None,
        preprocessing=Preprocessing.clip(pixels),
    )
