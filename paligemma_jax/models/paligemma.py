r"""PaliGemma (Beyer et al. 2024): SigLIP's vision tower, a linear projector, and Gemma with a prefix-LM mask.

The sequence is [image patches][text], and a row of text is [BOS prefix]["\n"][suffix EOS][padding]:

  tokens      <bos> how many ? \n  2  <eos> <pad>
  mask_ar       0    0    0  0  0  1    1     1     0 is bidirectional, 1 starts a causal block
  mask_input    1    1    1  1  1  1    1     0     no token attends to padding

Axes: see models.
"""

import dataclasses
from collections.abc import Mapping
from typing import TypedDict

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from paligemma_jax.images.preprocessing import Preprocessing
from paligemma_jax.models.attention import TokenMask, block_mask, packed_mask, prefix_lm_mask
from paligemma_jax.models.dropout import token_keys
from paligemma_jax.models.gemma import Gemma, GemmaConfig
from paligemma_jax.models.projection import Projection
from paligemma_jax.models.vit import ViT, ViTConfig
from train_jax.core import row_sharding
from train_jax.core.packed_rows import PackedRows


@dataclasses.dataclass(frozen=True)
class PaliGemmaConfig:
    """A vision tower and a decoder.

    Attributes:
      preprocessing: how images are prepared; None if unknown, as for a new model.
      image_token: id of a patch's placeholder in transformers' input, if the checkpoint has it; used only to write the
        same checkpoint again.
    """

    vision: ViTConfig = ViTConfig()
    decoder: GemmaConfig = GemmaConfig()
    preprocessing: Preprocessing | None = None
    image_token: int | None = None

    def replace(self, *, vision: dict | None = None, decoder: dict | None = None, both: dict | None = None):
        """Returns a copy with fields of the vision tower, of the decoder, or of both changed."""
        both = both or {}
        return dataclasses.replace(
            self,
            vision=dataclasses.replace(self.vision, **both, **(vision or {})),
            decoder=dataclasses.replace(self.decoder, **both, **(decoder or {})),
        )


class Gemma2Options(TypedDict):
    """The fields of GemmaConfig that all Gemma 2 decoders share."""

    attn_softcap: float
    sliding_window: int
    post_norms: bool


GEMMA_2 = Gemma2Options(attn_softcap=50.0, sliding_window=4096, post_norms=True)
DECODERS = {
    "3b": GemmaConfig(),
    "pg2-3b": GemmaConfig(width=2304, depth=26, mlp_dim=9216, num_heads=8, num_kv_heads=4, **GEMMA_2),
    "pg2-10b": GemmaConfig(width=3584, depth=42, mlp_dim=14_336, num_heads=16, num_kv_heads=8, **GEMMA_2),
    "pg2-28b": GemmaConfig(
        width=4608,
        depth=46,
        mlp_dim=36_864,
        num_heads=32,
        num_kv_heads=16,
        head_dim=128,
        query_scale=(4608 / 32) ** -0.5,  # only Gemma 2 27B scales by width / num_heads instead of head_dim
        **GEMMA_2,
    ),
}


def variant(name: str) -> PaliGemmaConfig:
    """Returns a config by name: "tiny" (the model in this package), or a released model with its resolution.

    Released are "3b", "pg2-3b", "pg2-10b" and "pg2-28b" (PaliGemma 2) at 224, 448 and 896 pixels: "3b-224",
    "pg2-10b-448". PaliGemma 2 was trained without a soft cap on the final logits (its paper and big_vision); the
    config.json of a checkpoint takes precedence when one is loaded. The preprocessing is that of transformers.

    Raises:
      ValueError: an unknown name.
    """
    if name == "tiny":
        return PaliGemmaConfig(
            vision=ViTConfig(
                image_size=96, patch_size=12, width=128, depth=4, mlp_dim=512, num_heads=4, posemb="sincos2d"
            ),
            decoder=GemmaConfig(vocab_size=1792, width=160, depth=5, mlp_dim=480, num_heads=4, head_dim=40),
            preprocessing=Preprocessing.siglip(96),
        )
    size, _, pixels = name.rpartition("-")
    if size in DECODERS and pixels in ("224", "448", "896"):
        return PaliGemmaConfig(
            vision=ViTConfig(image_size=int(pixels)),
            decoder=DECODERS[size],
            preprocessing=Preprocessing.siglip(int(pixels)),
        )
    raise ValueError(
        f"variant {name!r} is unknown, expected 'tiny', or one of {', '.join(DECODERS)} followed by -224, -448 or -896."
    )


class Projector(nnx.Module):
    """One linear layer from the vision tower's width to the decoder's."""

    def __init__(self, config: PaliGemmaConfig, *, rngs: nnx.Rngs):
        self.linear = Projection(
            "projector/linear",
            (config.vision.width,),
            (config.decoder.width,),
            use_bias=True,
            dtype=config.decoder.dtype,
            param_dtype=config.decoder.param_dtype,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "B P E"], dropout_keys=None) -> Float[Array, "B P D"]:
        """Returns projected patch features in float32."""
        return row_sharding.apply_block(
            self.linear, x, dropout_keys, call=lambda linear, x, keys: linear(x, keys, jnp.float32)
        )


class PaliGemma(nnx.Module):
    """Maps images and text to next-token logits at the text positions; see the module for the masks.

    `model(images, tokens, mask_ar, mask_input)` returns (logits, intermediates).
    """

    def __init__(self, config: PaliGemmaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.vision = ViT(config.vision, rngs=rngs)
        self.projector = Projector(config, rngs=rngs)
        self.decoder = Gemma(config.decoder, rngs=rngs)

    def __call__(
        self,
        images: Float[Array, "B I I 3"],
        tokens: Int[Array, "B T"],
        mask_ar: Int[Array, "B T"],
        mask_input: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        dropout_keys=None,
    ) -> tuple[Float[Array, "B T V"], dict]:
        """Returns logits at every text position; position t predicts token t + 1.

        Args:
          images: float32 in the checkpoint's value range ([-1, 1]), prepared by its preprocessing.
          tokens: text token ids only, without image placeholders.
          mask_ar: 0 over prefix and separator, 1 over suffix and padding; see the module's docstring.
          mask_input: true on real tokens; None means all are real. Padding may be on either side.
          dropout_keys: one key per example switches the randomness of training on; None is deterministic.

        Returns:
          logits: float32.
          out: named intermediates `vision/*`, `image_features`, `embedded`, `encoded`, `hidden`.
        """
        features, out = self.encode_image(images, dropout_keys)
        hidden, text_out = self.hidden(features, tokens, mask_ar, mask_input, dropout_keys)
        return self.decoder.logits(hidden), out | text_out

    def encode_image(self, images: Float[Array, "B I I 3"], dropout_keys=None) -> tuple[Float[Array, "B P D"], dict]:
        """Returns image features in the decoder's width, float32 and not scaled by sqrt(D), and intermediates.

        Args:
          images: as in a call of the model.
          dropout_keys: as in a call of the model.
        """
        x, out = self.vision(images, dropout_keys)
        features = self.projector(x, dropout_keys)
        return features, {f"vision/{k}": v for k, v in out.items()} | {"image_features": features}

    def context(self, features: Float[Array, "B P D"]) -> Float[Array, "B C D"]:
        """Returns the inputs of the decoder before the text, C of them, see Gemma.context."""
        return self.decoder.context(features)

    def hidden(
        self,
        features: Float[Array, "B P D"],
        tokens: Int[Array, "B T"],
        mask_ar: Int[Array, "B T"],
        mask_input: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        dropout_keys=None,
    ) -> tuple[Float[Array, "B T D"], dict]:
        """Returns float32 hidden states after the final norm at the text positions, and intermediates.

        Losses compute logits from these in chunks. `features` are those of `encode_image`; the other arguments are as
        in a call of the model.
        """
        if mask_input is None:
            mask_input = jnp.ones(tokens.shape, bool)
        features = self.context(features)
        valid, causal = join_masks(features.shape[1], mask_input, mask_ar)
        return self.decode(features, tokens, positions_of(valid), block_mask(valid, causal), dropout_keys)

    def hidden_of_texts(
        self, features: Float[Array, "B P D"], arrays: Mapping[str, Array], dropout_keys=None
    ) -> Float[Array, "B T D"]:
        """Returns `hidden` for the arrays `tokens`, `mask_ar` and `mask_input` of data.prompts.training_arrays.

        With the arrays `slots` and `positions`, several examples share a row of the decoder, see PackedRows.
        """
        tokens, mask_ar, mask_input = (arrays[name] for name in ("tokens", "mask_ar", "mask_input"))
        if "slots" not in arrays:
            return self.hidden(features, tokens, mask_ar, mask_input, dropout_keys)[0]
        rows, context = PackedRows(arrays["slots"], arrays["positions"]), self.context(features)
        valid, causal = join_masks(context.shape[1], mask_input, mask_ar)
        mask = prefix_lm_mask(rows.segment(valid), rows.of_positions(causal == 0))
        x = jnp.concatenate([context.astype(jnp.float32), self.decoder.embed_tokens(tokens)], axis=1)
        positions = rows.of_positions(positions_of(valid))
        keys = None if dropout_keys is None else token_keys(rows.of_examples(dropout_keys), positions)
        hidden, _, _ = self.decoder(rows.pack(x), positions, mask, dropout_keys=keys)
        return rows.unpack(hidden, context.shape[1])

    def hidden_of_texts_behind_one_image(
        self,
        features: Float[Array, "B P D"],
        tokens: Int[Array, "B T"],
        segment: Int[Array, "B T"],
        suffix: Int[Array, "B T"],
        offset: Int[Array, "B T"],
    ) -> Float[Array, "B T D"]:
        """Returns hidden states of several texts behind one image, which do not attend to one another.

        Args:
          features: image features, P patches.
          tokens: the texts, one after another.
          segment, suffix: see attention.packed_mask.
          offset: index of a token in its own text, from 0.
        """
        B, P = features.shape[:2]
        positions = jnp.concatenate([jnp.broadcast_to(jnp.arange(P), (B, P)), P + offset], axis=1)
        return self.decode(features, tokens, positions, packed_mask(segment, suffix, P))[0]

    def decode(
        self,
        features: Float[Array, "B P D"],
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B S"],
        mask: Bool[Array, "B S S"] | TokenMask,
        dropout_keys=None,
    ) -> tuple[Float[Array, "B T D"], dict]:
        """Returns what `hidden` returns, for given positions and a given mask.

        Args:
          features: the inputs before the text, from `context`.
          tokens: of the text.
          positions: rotary position of each of the S = P + T inputs.
          mask: whether input t attends to input s, [b, t, s].
          dropout_keys: as in a call of the model.
        """
        embedded = self.decoder.embed_tokens(tokens)
        x = jnp.concatenate([features.astype(jnp.float32), embedded], axis=1)
        keys = None if dropout_keys is None else token_keys(dropout_keys, positions)
        hidden, _, out = self.decoder(x, positions, mask, dropout_keys=keys)
        hidden = hidden[:, features.shape[1] :]
        return hidden, {"embedded": embedded, "encoded": out["encoded"], "hidden": hidden}


def join_masks(
    num_patches: int, mask_input: Bool[Array, "B T"] | Int[Array, "B T"], mask_ar: Int[Array, "B T"]
) -> tuple[Bool[Array, "B S"], Int[Array, "B S"]]:
    """Prepends the image to the text's masks (S = num_patches + T): its patches are real and not causal."""
    image = jnp.ones((mask_input.shape[0], num_patches), bool)
    valid = jnp.concatenate([image, mask_input.astype(bool)], axis=1)
    causal = jnp.concatenate([jnp.zeros(image.shape, jnp.int32), mask_ar.astype(jnp.int32)], axis=1)
    return valid, causal


def positions_of(valid: Bool[Array, "B S"]) -> Int[Array, "B S"]:
    """Returns the index of each real token among the real ones, from 0 (rotary positions are relative)."""
    return jnp.maximum(jnp.cumsum(valid.astype(jnp.int32), axis=1) - 1, 0)
