"""The text tower of a dual encoder: SigLIP's reads both ways, CLIP's from left to right. Axes: see models."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from paligemma_jax.models import encoder_block
from paligemma_jax.models.norms import LayerNorm
from paligemma_jax.models.stack import make_stack
from train_jax.core import row_sharding

POOLINGS = ("last", "eos")


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Sizes of a text tower.

    Attributes:
      length: positions, that is, tokens of a text at most.
      causal: whether a token reads only those before it (CLIP).
      pool: which position stands for the text: "last" (SigLIP, whose texts end in EOS and are padded to `length`) or
        "eos", the first `eos_token`; with no `eos_token` that of the largest id (CLIP as first released, where that
        was the last id of the table).
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

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def pools_alone(self) -> bool:
        """Whether the last block computes the pooled position apart: not in a loop over layers, which has one body."""
        return self.pool == "last" and self.unroll and self.remat == "none"


class TokenEmbedding(nnx.Module):
    """The word table."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        table = jax.random.normal(rngs.params(), (config.vocab_size, config.width)) * config.width**-0.5
        self.embedding = nnx.Param(table.astype(config.param_dtype))

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        # NaN for an id beyond the table
        rows = jnp.take(row_sharding.gathered(self.embedding), tokens, axis=0).astype(jnp.float32)
        return row_sharding.pin_rows(rows)


class TextEncoder(nnx.Module):
    """Words and learned positions, blocks, final norm, one position pooled."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        if config.pool not in POOLINGS:
            raise ValueError(f"pool is {config.pool!r}, expected one of {', '.join(POOLINGS)}.")
        self.config = config
        self.token_embedding = TokenEmbedding(config, rngs=rngs)
        positions = jax.random.normal(rngs.params(), (config.length, config.width)) * config.width**-0.5
        self.position_embedding = nnx.Param(positions.astype(config.param_dtype))
        self.layers = make_stack(lambda rngs: encoder_block.Block(config, "text", rngs=rngs), config.depth, rngs)
        self.final_layer_norm = LayerNorm(config.width, eps=config.eps, param_dtype=config.param_dtype)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        dropout_keys=None,
        prompts: Float[Array, "K M D"] | None = None,
    ) -> tuple[Float[Array, "B D"], dict]:
        """Encodes texts.

        Args:
          tokens: ids, at most `config.length` a text. SigLIP's pooled position is the last of the array: pad in full.
          mask: true on tokens that may be read; None means all, padding too, as SigLIP was trained.
          dropout_keys: one key an example switches adapter dropout on.
          prompts: M learned inputs of each of the first K layers (adapt/few_shot/prompts.py), in the places that
            `prompt_start` tells.

        Returns:
          The pooled vectors, float32, and the named intermediates `embedded`, `encoded` [B, T, D] and `pooled`.

        Raises:
          ValueError: more tokens than positions, or no room for the prompts.
        """
        config = self.config
        T = tokens.shape[1]
        if config.length < T:
            raise ValueError(f"texts have {T} tokens, expected at most {config.length}: cut them to that.")
        options = dict(depth=config.depth, remat=config.remat, unroll=config.unroll)
        if prompts is None:
            embedded = self.token_embedding(tokens)
        else:
            start = self.prompt_start
            tokens, mask = _with_room(tokens, mask, prompts.shape[1], start)
            embedded = self.token_embedding(tokens).at[:, start : start + prompts.shape[1]].set(prompts[:1])
            options |= dict(prompts=prompts, start=start)
        embedded = embedded + self.position_embedding[...][None, :T].astype(jnp.float32)
        visible = _visible(mask, tokens, config.causal)
        if dropout_keys is None and prompts is None and config.pools_alone:
            # Of the last block the pooled position alone: under jit `encoded` costs nothing where nobody reads it.
            before, last = encoder_block.split_last(self.layers)
            x = row_sharding.pin_rows(embedded)
            if config.depth > 1:
                x = encoder_block.run_blocks(before, x, mask=visible, **(options | {"depth": config.depth - 1}))

            def through(call):
                run = lambda block, x, mask: call(block, x, mask=mask)  # noqa: E731
                return self.final_layer_norm(row_sharding.apply_block(last, x, visible, call=run))

            encoded, pooled = through(encoder_block.Block.__call__), through(encoder_block.Block.last)[:, 0]
        else:
            x = encoder_block.run_blocks(self.layers, embedded, dropout_keys, mask=visible, **options)
            encoded = self.final_layer_norm(x)
            pooled = self._pooled(encoded, tokens)
        return pooled, {"embedded": embedded, "encoded": encoded, "pooled": pooled}

    @property
    def prompt_start(self) -> int:
        """Where prompts stand: behind CLIP's start mark, at the front of SigLIP's texts, which have none."""
        return 1 if self.config.pool == "eos" else 0

    def _pooled(self, encoded: Float[Array, "B T D"], tokens: Int[Array, "B T"]) -> Float[Array, "B D"]:
        """One position each; without a gather over rows, for which devices would exchange them."""
        config = self.config
        if config.pool == "last":
            return encoded[:, -1]
        position = jnp.argmax(tokens if config.eos_token is None else tokens == config.eos_token, axis=1)
        return jnp.take_along_axis(encoded, position[:, None, None], axis=1)[:, 0]


def _with_room(
    tokens: Int[Array, "B T"], mask: Array | None, room: int, start: int
) -> tuple[Int[Array, "B T"], Array | None]:
    """Texts with `room` places from `start` on whose words do not matter, and which are read.

    Two prompts, as the rows of text become:

      CLIP     start a photo of a cat end        start P P of a cat end           the words there give way
      SigLIP   a photo of a cat </s> </s> </s>   P P a photo of a cat </s>        moved; the last, pooled, stays last
      SigLIP   one two three four five six </s>  P P one two three four </s>      a text without padding loses words

    Raises:
      ValueError: nothing would be left of a text.
    """
    T = tokens.shape[1]
    if start + room >= T:
        raise ValueError(f"texts have {T} tokens, expected more than the {start + room} up to the last of the prompts.")
    if start == 0:
        tokens, mask = (
            None if rows is None else jnp.concatenate([rows[:, :room], rows[:, : T - room - 1], rows[:, -1:]], axis=1)
            for rows in (tokens, mask)
        )
    if mask is not None:
        mask = jnp.asarray(mask, bool).at[:, start : start + room].set(True)
    return tokens, mask


def _visible(mask: Array | None, tokens: Int[Array, "B T"], causal: bool) -> Bool[Array, "B T T"] | None:
    """Who reads whom; None if everybody everybody."""
    if mask is None and not causal:
        return None
    B, T = tokens.shape
    keys = jnp.ones((B, 1, T), bool) if mask is None else mask.astype(bool)[:, None]
    return jnp.broadcast_to(keys & jnp.tri(T, dtype=bool)[None] if causal else keys, (B, T, T))
