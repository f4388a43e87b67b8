"""The text tower of a dual encoder: bidirectional in SigLIP, causal in CLIP. Axes: see models."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from paligemma_jax.models.encoder_block import EncoderBlock, run_blocks, split_last
from paligemma_jax.models.norms import LayerNorm
from paligemma_jax.models.stack import make_stack
from train_jax.core import row_sharding

TEXT_POOLINGS = ("last", "eos")


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Sizes of a text tower.

    Attributes:
      length: number of positions, the maximum number of tokens of a text.
      causal: whether attention is causal (CLIP).
      pool: the position that is pooled: "last" (SigLIP, whose texts end in EOS and are padded to `length`) or "eos",
        the first `eos_token`; without an `eos_token`, the position of the largest id (the first CLIP checkpoints, where
        EOS is the last id of the vocabulary).
    """

    vocab_size: int = 32_000
    length: int = 64
    width: int = 768
    depth: int = 12
    mlp_dim: int = 3072
    num_heads: int = 12
    eps: float = 1e-6
    activation: str = "gelu_tanh"  # see encoder_block.ACTIVATIONS
    causal: bool = False
    pool: str = "last"
    eos_token: int | None = None
    remat: str = "none"  # see stack.scan_stack
    unroll: bool = False  # see stack.scan_stack
    dtype: str = "float32"  # compute dtype
    param_dtype: str = "float32"
    attention: str = "auto"  # the kernel, see attention.has_flash

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.num_heads

    @property
    def last_block_pools(self) -> bool:
        """Whether the last block may compute the pooled position alone; a scan runs the same code for all layers."""
        return self.pool == "last" and self.unroll and self.remat == "none"


class TokenEmbedding(nnx.Module):
    """The token embedding."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        table = jax.random.normal(rngs.params(), (config.vocab_size, config.width)) * config.width**-0.5
        self.embedding = nnx.Param(table.astype(config.param_dtype))

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embeds tokens; an id outside the vocabulary gives NaN."""
        return row_sharding.look_up(self.embedding, tokens).astype(jnp.float32)


class TextEncoder(nnx.Module):
    """Token embedding and learned positions, blocks, final norm, and pooling of one position."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        if config.pool not in TEXT_POOLINGS:
            raise ValueError(f"pool is {config.pool!r}, expected one of {', '.join(TEXT_POOLINGS)}.")
        self.config = config
        self.token_embedding = TokenEmbedding(config, rngs=rngs)
        positions = jax.random.normal(rngs.params(), (config.length, config.width)) * config.width**-0.5
        self.position_embedding = nnx.Param(positions.astype(config.param_dtype))
        self.layers = make_stack(lambda rngs: EncoderBlock(config, "text", rngs=rngs), config.depth, rngs)
        self.final_layer_norm = LayerNorm(config.width, eps=config.eps, param_dtype=config.param_dtype)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        dropout_keys=None,
    ) -> tuple[Float[Array, "B D"], dict]:
        """Encodes texts.

        Args:
          tokens: at most `config.length` ids per text. SigLIP pools the last position of the array: pad to full length.
          mask: true on tokens to attend to; None means all, padding included, as SigLIP was trained.
          dropout_keys: one key per example switches the randomness of training on; None is deterministic.

        Returns:
          The pooled vectors, float32, and the named intermediates `embedded`, `encoded` [B, T, D] and `pooled`.

        Raises:
          ValueError: more tokens than positions.
        """
        config = self.config
        T = tokens.shape[1]
        if config.length < T:
            raise ValueError(f"texts have {T} tokens, expected at most {config.length}: cut them to that.")
        embedded = self.embed(tokens) + self.position_embedding[...][None, :T].astype(jnp.float32)
        visible = _attention_mask(mask, tokens, config.causal)
        if dropout_keys is None and config.last_block_pools:
            # `pooled` needs one position of the last block; under jit `encoded` costs nothing if it is not used.
            before, last = split_last(self.layers)
            x = row_sharding.pin_rows(embedded)
            if config.depth > 1:
                x = run_blocks(before, x, depth=config.depth - 1, mask=visible, unroll=True)

            def apply_last(call):
                return self.final_layer_norm(row_sharding.apply_block(last, x, visible, call=call))

            encoded = apply_last(lambda block, x, mask: block(x, mask=mask))
            pooled = apply_last(lambda block, x, mask: block.last(x, mask=mask))[:, 0]
        else:
            x = run_blocks(
                self.layers,
                embedded,
                dropout_keys,
                depth=config.depth,
                mask=visible,
                remat=config.remat,
                unroll=config.unroll,
            )
            encoded = self.final_layer_norm(x)
            pooled = self._pooled(encoded, tokens)
        return pooled, {"embedded": embedded, "encoded": encoded, "pooled": pooled}

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Returns the inputs of the tower without positions, float32."""
        return self.token_embedding(tokens)

    def _pooled(self, encoded: Float[Array, "B T D"], tokens: Int[Array, "B T"]) -> Float[Array, "B D"]:
        """Returns one position per text; take_along_axis needs no communication when rows are sharded."""
        config = self.config
        if config.pool == "last":
            return encoded[:, -1]
        position = jnp.argmax(tokens if config.eos_token is None else tokens == config.eos_token, axis=1)
        return jnp.take_along_axis(encoded, position[:, None, None], axis=1)[:, 0]


def _attention_mask(mask: Array | None, tokens: Int[Array, "B T"], causal: bool) -> Bool[Array, "B _ T"] | None:
    """Returns the attention mask of padding and causality; None if every token attends to every token."""
    if mask is None and not causal:
        return None
    B, T = tokens.shape
    keys = jnp.ones((B, 1, T), bool) if mask is None else mask.astype(bool)[:, None]
    return keys & jnp.tri(T, dtype=bool)[None] if causal else keys
