"""The towers of a dual encoder with learned prompts: M inputs more for each of the first K layers.

Before layer k, 1 <= k < K, the prompts of layer k replace those of the layer before; from layer K on they are passed on
as part of the sequence (deep prompts: Jia et al. 2022; Khattak et al. 2023).

They are attached to a copy of the model for the time of a call, since vision prompts may be computed from text prompts
(learned_prompts.py). Axes: see models; M prompts per layer, K layers with prompts.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from paligemma_jax.adapt import attachment
from paligemma_jax.models.encoder_block import EncoderBlock
from paligemma_jax.models.text_encoder import TextConfig, TextEncoder
from paligemma_jax.models.vit import ViT


class PromptedBlock(EncoderBlock):
    """A block that replaces a part of its input by prompts.

    Attributes:
      deep_prompts: [M, D], with a leading axis of layers in a stack.
      has_prompts: whether the layer replaces prompts, with a leading axis of layers in a stack.
      start: first position of the prompts.
    """

    ADDS = ("deep_prompts", "has_prompts", "start")

    deep_prompts: nnx.Variable
    has_prompts: nnx.Variable
    start: int

    def __call__(
        self, x: Float[Array, "B T D"], dropout_keys=None, *, mask: Bool[Array, "B _ T"] | None = None
    ) -> Float[Array, "B T D"]:
        """As in EncoderBlock."""
        return super().__call__(self._replaced(x), dropout_keys, mask=mask)

    def last(self, x: Float[Array, "B T D"], *, mask: Bool[Array, "B _ T"] | None = None) -> Float[Array, "B 1 D"]:
        """As in EncoderBlock."""
        return super().last(self._replaced(x), mask=mask)

    def _replaced(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        prompts = self.deep_prompts[...]
        positions = slice(self.start, self.start + len(prompts))
        return x.at[:, positions].set(jnp.where(self.has_prompts[...], prompts[None], x[:, positions]))


class PromptedViT(ViT):
    """A vision tower with `prompts` [K, M, D], which follow the patches, have no position, and are not returned."""

    ADDS = ("prompts",)

    prompts: nnx.Variable

    def run_layers(self, x: Float[Array, "B S D"], dropout_keys=None) -> Float[Array, "B S D"]:
        """As in ViT."""
        first = self.prompts[...][0]
        if self.config.class_token:
            first = self.pre_layernorm(first)
        x = jnp.concatenate([x, jnp.broadcast_to(first[None], (len(x), *first.shape))], axis=1)
        return super().run_layers(x, dropout_keys)[:, : self.config.num_tokens]


class PromptedTextEncoder(TextEncoder):
    """A text tower with `prompts` [K, M, D], at the positions from `start_of_prompts` on."""

    ADDS = ("prompts",)

    prompts: nnx.Variable

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        dropout_keys=None,
    ) -> tuple[Float[Array, "B D"], dict]:
        """As in TextEncoder.

        Raises:
          ValueError: as in TextEncoder, or there is no room for the prompts.
        """
        tokens, mask = insert_placeholders(tokens, mask, self.prompts.shape[1], start_of_prompts(self.config))
        return super().__call__(tokens, mask, dropout_keys)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """As in TextEncoder."""
        start, first = start_of_prompts(self.config), self.prompts[...][:1]
        return super().embed(tokens).at[:, start : start + first.shape[1]].set(first)


def attach_to_vision(tower: ViT, prompts: Float[Array, "K M D"]) -> None:
    """Attaches prompts to a vision tower, in place."""
    _attach_to_layers(tower.layers, prompts, tower.config.depth, tower.config.num_tokens)
    attachment.attach(tower, PromptedViT, prompts=nnx.Variable(prompts))


def attach_to_text(tower: TextEncoder, prompts: Float[Array, "K M D"]) -> None:
    """Attaches prompts to a text tower, in place."""
    _attach_to_layers(tower.layers, prompts, tower.config.depth, start_of_prompts(tower.config))
    attachment.attach(tower, PromptedTextEncoder, prompts=nnx.Variable(prompts))


def _attach_to_layers(stack: EncoderBlock, prompts: Float[Array, "K M D"], depth: int, start: int) -> None:
    """Attaches prompts to a stack of blocks, in place, if a layer after the first has any."""
    K, layers = len(prompts), jnp.arange(depth)
    if K > 1:
        attachment.attach(
            stack,
            PromptedBlock,
            deep_prompts=nnx.Variable(jnp.pad(prompts, ((0, depth - K), (0, 0), (0, 0)))),
            has_prompts=nnx.Variable((layers > 0) & (layers < K)),
            start=start,
        )


def start_of_prompts(config: TextConfig) -> int:
    """Returns the first position of text prompts: after CLIP's start token, or 0 in SigLIP, which has none."""
    return 1 if config.pool == "eos" else 0


def insert_placeholders(
    tokens: Int[Array, "B T"], mask: Array | None, num_prompts: int, start: int
) -> tuple[Int[Array, "B T"], Array | None]:
    """Returns tokens and mask with `num_prompts` visible placeholders from position `start` on.

    The texts keep their length. With two prompts P:

      CLIP     start a photo of a cat end        start P P of a cat end       prompts replace the tokens there
      SigLIP   a photo of a cat </s> </s> </s>   P P a photo of a cat </s>    the text moves, the pooled token stays
      SigLIP   one two three four five six </s>  P P one two three four </s>  a text without padding is truncated

    Raises:
      ValueError: no token of a text would be left.
    """
    T = tokens.shape[1]
    if start + num_prompts >= T:
        raise ValueError(
            f"texts have {T} tokens, expected more than the {start + num_prompts} up to the last of the prompts."
        )

    def shift(rows: Array) -> Array:
        return jnp.concatenate([rows[:, :num_prompts], rows[:, : T - num_prompts - 1], rows[:, -1:]], axis=1)

    if start == 0:
        tokens, mask = shift(tokens), None if mask is None else shift(mask)
    if mask is not None:
        mask = jnp.asarray(mask, bool).at[:, start : start + num_prompts].set(True)
    return tokens, mask
