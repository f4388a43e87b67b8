"""SigLIP (Zhai et al. 2023) and CLIP (Radford et al. 2021): images and texts as unit vectors of one space.

  images -> vision -> pooling [-> image_projection] -> unit length
  tokens -> text -> one position -> text_projection -> unit length

SigLIP pools with an attention head and has no image projection; CLIP pools its class token. The logit of an image and a
text is exp(logit_scale) times their cosine, plus logit_bias in SigLIP. Axes: see models; E embedding width, C texts
(their number may differ from that of the images).
"""

import dataclasses
import math

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from paligemma_jax.images.preprocessing import Preprocessing
from paligemma_jax.models.pooling import IMAGE_POOLINGS, MAPHead
from paligemma_jax.models.projection import Projection
from paligemma_jax.models.text_encoder import TextConfig, TextEncoder
from paligemma_jax.models.vit import ViT, ViTConfig


@dataclasses.dataclass(frozen=True)
class DualEncoderConfig:
    """Both towers, pooling, projections and logits.

    Attributes:
      embed_dim: width of an embedding; without an image projection, the width of the vision tower.
      pool: pooling of the image features: "map" (attention head), "gap" (mean) or "class" (CLIP's class token).
      image_projection: whether a linear layer follows the pooling (CLIP).
      projection_bias: whether projections have a bias (SigLIP, big_vision).
      initial_scale, initial_bias: initial values of logit_scale (a logarithm) and logit_bias; a bias of None is not
        learned. The paper's -10 is for batches of 32,768, near the log-odds of a positive, -log(B - 1).
      preprocessing: how images are prepared; None if unknown, as for a new model.
    """

    vision: ViTConfig = ViTConfig()
    text: TextConfig = TextConfig()
    embed_dim: int = 768
    pool: str = "map"
    image_projection: bool = False
    projection_bias: bool = True
    initial_scale: float = math.log(10.0)
    initial_bias: float | None = -10.0
    preprocessing: Preprocessing | None = None

    def __post_init__(self):
        if self.pool not in IMAGE_POOLINGS or (self.pool == "class") != self.vision.class_token:
            raise ValueError(
                f"pool is {self.pool!r} of a tower {'with' if self.vision.class_token else 'without'} a class token, "
                "expected 'class' with one, 'map' or 'gap' without."
            )
        if not self.image_projection and self.embed_dim != self.vision.width:
            raise ValueError(
                f"embed_dim is {self.embed_dim}, expected the vision tower's width {self.vision.width}, as there is no "
                "image projection."
            )

    def replace(self, *, vision: dict | None = None, text: dict | None = None, both: dict | None = None, **own):
        """Returns a copy with fields of either tower, of both towers, or of this config changed."""
        both = both or {}
        return dataclasses.replace(
            self,
            vision=dataclasses.replace(self.vision, **both, **(vision or {})),
            text=dataclasses.replace(self.text, **both, **(text or {})),
            **own,
        )


class DualEncoder(nnx.Module):
    """Maps images and texts to embeddings of unit length.

    A subclass may add parts to the model. The argument `NAME=False` leaves the part of that name out of a call; a model
    without the part takes it too, so that the same code calls the base of any dual encoder.
    """

    def __init__(self, config: DualEncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.vision = ViT(config.vision, rngs=rngs)
        if config.pool == "map":
            self.image_head = MAPHead(config.vision, rngs=rngs)
        if config.image_projection:
            self.image_projection = _projection("image_projection", config.vision, config, rngs)
        self.text = TextEncoder(config.text, rngs=rngs)
        self.text_projection = _projection("text_projection", config.text, config, rngs)
        dtype = jnp.dtype(config.vision.param_dtype)
        self.logit_scale = nnx.Param(jnp.asarray(config.initial_scale, dtype))
        bias = config.initial_bias
        self.logit_bias = nnx.data(None) if bias is None else nnx.Param(jnp.asarray(bias, dtype))

    def __call__(
        self,
        images: Float[Array, "B I I 3"],
        tokens: Int[Array, "C T"],
        mask: Bool[Array, "C T"] | Int[Array, "C T"] | None = None,
        dropout_keys=None,
        **parts: bool,
    ) -> tuple[Float[Array, "B E"], Float[Array, "C E"], dict]:
        """Embeds images and texts; their numbers may differ.

        Args:
          images: float32, prepared by `config.preprocessing`.
          tokens: ids padded by the model's tokenizer (data/tokenizers/text_tower.py).
          mask: true on real tokens, for CLIP; None attends to all tokens, as SigLIP does.
          dropout_keys: one key per pair switches the randomness of training on; None is deterministic.
          parts: see the class.

        Returns:
          image_embeds, text_embeds: float32, of unit length.
          out: named intermediates `vision/*`, `text/*`, `image_features` and `text_features` (of any length).
        """
        image_embeds, image_out = self.encode_image(images, dropout_keys, **parts)
        text_embeds, text_out = self.encode_text(tokens, mask, dropout_keys, **parts)
        return image_embeds, text_embeds, image_out | text_out

    def encode_image(
        self, images: Float[Array, "B I I 3"], dropout_keys=None, **parts: bool
    ) -> tuple[Float[Array, "B E"], dict]:
        """Returns embeddings of images, float32 of unit length, and intermediates."""
        x, out = self.vision(images, dropout_keys)
        embeds, head_out = self.embed_features(x, dropout_keys, **parts)
        return embeds, {f"vision/{k}": v for k, v in out.items()} | head_out

    def embed_features(
        self, x: Float[Array, "B S D"], dropout_keys=None, **parts: bool
    ) -> tuple[Float[Array, "B E"], dict]:
        """Returns embeddings of images from the vision tower's output, and the intermediate `image_features`."""
        _check_left_out(parts)
        config = self.config
        if config.pool == "map":
            features = self.image_head(x, dropout_keys)
        else:
            features = x.mean(axis=1) if config.pool == "gap" else x[:, 0]
        if config.image_projection:
            features = self.image_projection(features, dropout_keys, jnp.float32)
        return self.image_embeds(features), {"image_features": features}

    def encode_text(
        self,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        dropout_keys=None,
        **parts: bool,
    ) -> tuple[Float[Array, "B E"], dict]:
        """Returns embeddings of texts, float32 of unit length, and intermediates."""
        _check_left_out(parts)
        pooled, out = self.text(tokens, mask, dropout_keys)
        features = self.text_projection(pooled, dropout_keys, jnp.float32)
        out = {f"text/{k}": v for k, v in out.items()} | {"text_features": features}
        return self.text_embeds(features), out

    def image_embeds(self, features: Float[Array, "B E"]) -> Float[Array, "B E"]:
        """Returns embeddings from features of images."""
        return unit(features)

    def text_embeds(self, features: Float[Array, "B E"]) -> Float[Array, "B E"]:
        """Returns embeddings from features of texts."""
        return unit(features)

    def logits(self, image_embeds: Float[Array, "B E"], text_embeds: Float[Array, "C E"]) -> Float[Array, "B C"]:
        """Returns exp(logit_scale) * cosine + logit_bias for every image and text, float32."""
        scale = jnp.exp(self.logit_scale[...].astype(jnp.float32))
        logits = scale * jnp.einsum("BE,CE->BC", image_embeds, text_embeds, precision=lax.Precision.HIGHEST)
        return logits if self.logit_bias is None else logits + self.logit_bias[...].astype(jnp.float32)


def _check_left_out(parts: dict[str, bool]) -> None:
    """Raises TypeError if an argument asks for a part, as a base model has none."""
    for name, value in parts.items():
        if value is not False:
            raise TypeError(f"the model has no part {name!r}, but {name}={value!r}: leave it out, or attach the part.")


def unit(x: Float[Array, "B E"]) -> Float[Array, "B E"]:
    """Scales rows to length 1; rows of zeros stay zeros, with a finite gradient."""
    return x * lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-24))


def _projection(name: str, tower: ViTConfig | TextConfig, config: DualEncoderConfig, rngs: nnx.Rngs):
    return Projection(
        name,
        (tower.width,),
        (config.embed_dim,),
        use_bias=config.projection_bias,
        dtype=tower.dtype,
        param_dtype=tower.param_dtype,
        rngs=rngs,
    )
