"""The Gemma decoder (Gemma Team 2024): RMSNorm, rotary positions, grouped queries, gated GELU. Axes: see models.

Gemma 2 (Riviere et al. 2024) adds norms after each branch, soft caps, and a sliding window in every other layer.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from paligemma_jax.models import encoder_block
from paligemma_jax.models.attention import TokenMask, attention, has_flash, rotary
from paligemma_jax.models.dropout import fold_in_name
from paligemma_jax.models.norms import RMSNorm
from paligemma_jax.models.numerics import cast, soft_cap
from paligemma_jax.models.projection import Projection
from paligemma_jax.models.stack import MLP, make_stack, scan_stack
from train_jax.core import row_sharding


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """Sizes of a decoder; the defaults are PaliGemma 3B's. Soft caps, sliding window and post norms are Gemma 2's."""

    vocab_size: int = 257_152
    width: int = 2048
    depth: int = 18
    mlp_dim: int = 16_384
    num_heads: int = 8
    num_kv_heads: int = 1
    head_dim: int = 256
    eps: float = 1e-6
    rope_theta: float = 10_000.0
    activation: str = "gelu_tanh"  # of the gate, see encoder_block.ACTIVATIONS
    query_scale: float | None = None  # factor on the scores; None means head_dim ** -0.5
    attn_softcap: float | None = None
    final_softcap: float | None = None
    sliding_window: int | None = None  # positions that layers 0, 2, 4, ... attend to, the current one included
    post_norms: bool = False
    remat: str = "none"  # see stack.scan_stack
    unroll: bool = False  # see stack.scan_stack
    dtype: str = "float32"  # compute dtype
    param_dtype: str = "float32"
    attention: str = "auto"  # the kernel, see attention.has_flash

    @property
    def attention_share(self) -> float:
        """FLOPs of scores and weighted values for each key that a token attends to, over those of a layer's kernels."""
        heads, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return 2 * heads / (self.width * (2 * heads + 2 * keys + 3 * self.mlp_dim))


class Embedder(nnx.Module):
    """The token embedding, scaled by sqrt(D); the vocabulary projection is tied to it."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs):
        table = jax.random.normal(rngs.params(), (config.vocab_size, config.width), jnp.float32) * config.width**-0.5
        self.embedding = nnx.Param(table.astype(jnp.dtype(config.param_dtype)))

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Returns the scaled embeddings of tokens, float32; an id outside the vocabulary gives NaN."""
        x = row_sharding.look_up(self.embedding, tokens).astype(jnp.float32)
        return x * x.shape[-1] ** 0.5


class GemmaAttention(nnx.Module):
    """Grouped-query attention with rotary positions and an optional key/value cache."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = (config.width,)
        queries, keys = (config.num_heads, config.head_dim), (config.num_kv_heads, config.head_dim)
        self.q_proj = _projection(config, "decoder/q_proj", width, queries, rngs)
        self.k_proj = _projection(config, "decoder/k_proj", width, keys, rngs)
        self.v_proj = _projection(config, "decoder/v_proj", width, keys, rngs)
        self.o_proj = _projection(config, "decoder/o_proj", queries, width, rngs)

    def __call__(self, x, positions, mask, cache=None, layer_and_slot=(0, 0), dropout_keys=None):
        """Returns the attention's output [B, T, D] in float32, and the cache with the new keys and values written.

        Args:
          x: normalized inputs [B, T, D].
          positions: rotary positions [B, T].
          mask: whether input t attends to key s, bool [B, T, S].
          cache: {"k", "v"} of [L, B, S, K, H] for all layers, or None.
          layer_and_slot: number of this layer and first slot of the cache to write.
          dropout_keys: one key per example for the randomness of training; None is deterministic.
        """
        config = self.config
        q = rotary(self.q_proj(x, dropout_keys), positions, config.rope_theta)
        k = rotary(self.k_proj(x, dropout_keys), positions, config.rope_theta)
        v = self.v_proj(x, dropout_keys)
        if cache is not None:
            layer, start = layer_and_slot
            cache = {
                name: lax.dynamic_update_slice(
                    cache[name], new[None].astype(cache[name].dtype), (layer, 0, start, 0, 0)
                )
                for name, new in (("k", k), ("v", v))
            }
            k, v = (lax.dynamic_index_in_dim(cache[name], layer, keepdims=False).astype(q.dtype) for name in "kv")
        return self.o_proj(self.attend(q, k, v, mask), dropout_keys, jnp.float32), cache

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        mask: Bool[Array, "B T S"] | TokenMask | None,
    ) -> Float[Array, "B T N H"]:
        """Returns the weighted values of each query, before the output projection."""
        config = self.config
        scale = config.query_scale or config.head_dim**-0.5
        return attention(q, k, v, mask, scale=scale, cap=config.attn_softcap, kernel=config.attention)


class GemmaMlp(nnx.Module):
    """The gated MLP down(act(gate(x)) * up(x)); act is the config's activation.

    Gate and up are rounded to the compute dtype, as by transformers and big_vision: two arrays of the size of the MLP
    are most of what a layer keeps or moves. The activation and the elementwise product are computed in float32.
    """

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs):
        encoder_block.check_activation(config.activation)
        self.activation = config.activation
        self.gate_proj = _projection(config, "decoder/gate_proj", (config.width,), (config.mlp_dim,), rngs)
        self.up_proj = _projection(config, "decoder/up_proj", (config.width,), (config.mlp_dim,), rngs)
        self.down_proj = _projection(config, "decoder/down_proj", (config.mlp_dim,), (config.width,), rngs)

    def __call__(self, x: Float[Array, "B T D"], dropout_keys=None) -> Float[Array, "B T D"]:
        """Returns the MLP's output in float32."""
        gate, up = (checkpoint_name(project(x, dropout_keys), MLP) for project in (self.gate_proj, self.up_proj))
        return self.down_proj(encoder_block.activate(self.activation, gate, up), dropout_keys, jnp.float32)


class GemmaBlock(nnx.Module):
    """One decoder layer; with `post_norms` each branch is normalized again before it is added (Gemma 2)."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs):
        self.pre_attention_norm = _norm(config)
        self.self_attn = GemmaAttention(config, rngs=rngs)
        self.pre_ffw_norm = _norm(config)
        self.mlp = GemmaMlp(config, rngs=rngs)
        self.post_attention_norm = _norm(config) if config.post_norms else nnx.data(None)
        self.post_ffw_norm = _norm(config) if config.post_norms else nnx.data(None)

    def __call__(self, x, positions, mask, cache=None, layer_and_slot=(0, 0), dropout_keys=None):
        """Returns the residual stream after the layer, and the written cache; arguments as of GemmaAttention."""
        branch, cache = self.self_attn(self.pre_attention_norm(x), positions, mask, cache, layer_and_slot, dropout_keys)
        x = x + self.attention_residual(branch)
        branch = self.mlp(self.pre_ffw_norm(x), dropout_keys)
        return x + self.mlp_residual(branch), cache

    def attention_residual(self, branch: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns the attention's contribution to the residual stream."""
        return branch if self.post_attention_norm is None else self.post_attention_norm(branch)

    def mlp_residual(self, branch: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns the MLP's contribution to the residual stream."""
        return branch if self.post_ffw_norm is None else self.post_ffw_norm(branch)


def _projection(
    config: GemmaConfig, name: str, in_shape: tuple[int, ...], out_shape: tuple[int, ...], rngs: nnx.Rngs
) -> Projection:
    """Makes a projection with the config's dtypes."""
    return Projection(name, in_shape, out_shape, dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs)


def _norm(config: GemmaConfig) -> RMSNorm:
    return RMSNorm(config.width, eps=config.eps, param_dtype=config.param_dtype)


class Gemma(nnx.Module):
    """Token embedding, blocks and final norm; `logits` is a separate call, so that losses can compute it in chunks."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = Embedder(config, rngs=rngs)
        self.layers = make_stack(lambda rngs: GemmaBlock(config, rngs=rngs), config.depth, rngs)
        self.norm = _norm(config)

    @property
    def stacks(self) -> Sequence[GemmaBlock]:
        """The stacks of blocks, first to last; `layers` may be a list of several (generation/layers_apart.py)."""
        return list(self.layers) if isinstance(self.layers, nnx.List) else [self.layers]

    def context(self, features: Float[Array, "B P D"]) -> Float[Array, "B C D"]:
        """Returns all inputs before the text: here the image features alone."""
        return features

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T S"] | TokenMask,
        cache: dict | None = None,
        start: Int[Array, ""] | int = 0,
        dropout_keys=None,
    ) -> tuple[Float[Array, "B T D"], dict | None, dict]:
        """Runs the blocks over embedded inputs.

        Args:
          x: embedded tokens (scaled by sqrt(D)) and image features (unscaled), float32.
          positions: rotary position of each input, counted over real tokens.
          mask: attention mask; S is T without a cache, else the cache's length. If the config has a sliding window,
            `sliding_mask` narrows the mask in every other layer. A TokenMask is for calls without a cache.
          cache: from `empty_cache`, or None.
          start: first cache slot to write.
          dropout_keys: one key per example or token for the randomness of training; None is deterministic.

        Returns:
          Hidden states after the final norm (float32), the written cache, and the intermediate `encoded` (the residual
          stream before the final norm).
        """
        window, windowed, new_positions = self.config.sliding_window, None, {}
        if isinstance(mask, TokenMask) and not self._has_flash(x.shape[1]):
            mask = mask.dense()  # once, not in every layer
        if isinstance(mask, TokenMask):
            if window is not None and x.shape[1] > window:
                windowed, mask = mask.windowed(positions, window), mask._replace(first=jnp.zeros_like(mask.last))
        elif window is not None and mask.shape[2] > window:
            key_positions = positions
            if cache is not None:
                key_positions = lax.dynamic_update_slice(cache["positions"], positions[None], (0, 0, start))[0]
                new_positions = {"positions": key_positions[None]}
            windowed = sliding_mask(mask, positions, key_positions, window, start)
        if cache is not None:
            cache = {name: cache[name] for name in "kv"}

        def call(block, carry, layer):
            x, cache = carry
            keys = None if dropout_keys is None else fold_in_name(dropout_keys, layer)
            visible = mask
            if windowed is not None:
                visible = jax.tree.map(lambda near, all: jnp.where(layer % 2 == 0, near, all), windowed, mask)
            return block(x, positions, visible, cache, (layer, start), keys), None

        carry, first = (x.astype(jnp.float32), cache), 0
        for stack in self.stacks:
            layers = first + jnp.arange(stack.pre_attention_norm.scale.shape[0])
            first += len(layers)
            carry, _ = scan_stack(
                stack, call, carry, layers, remat=self.config.remat, unroll=self.config.unroll, row_axes=(0, 1)
            )
        x, cache = carry
        return self.norm(x), None if cache is None else cache | new_positions, {"encoded": x}

    def _has_flash(self, length: int) -> bool:
        """Returns whether attention without a cache uses a flash kernel."""
        config = self.config
        return has_flash(config.attention, length, config.head_dim, jnp.dtype(config.dtype), config.attn_softcap)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns float32 logits over the vocabulary, with the config's final soft cap."""
        dtype = jnp.dtype(self.config.dtype)
        table = row_sharding.gathered(self.embed_tokens.embedding).astype(dtype)
        logits = jnp.einsum("BTD,VD->BTV", cast(hidden, dtype), table, preferred_element_type=jnp.float32)
        return soft_cap(logits, self.config.final_softcap)

    def empty_cache(self, batch: int, length: int, dtype=None) -> dict[str, Array]:
        """Returns an empty cache of `length` slots: {"k", "v"} of [L, B, S, K, H], in `dtype` or the compute dtype.

        If the sliding window is shorter than the cache, it also holds the slots' "positions", int32 [1, B, S].
        """
        config = self.config
        shape = (config.depth, batch, length, config.num_kv_heads, config.head_dim)
        cache = {name: jnp.zeros(shape, jnp.dtype(dtype or config.dtype)) for name in "kv"}
        if config.sliding_window is not None and length > config.sliding_window:
            cache["positions"] = jnp.zeros((1, batch, length), jnp.int32)
        return cache


def sliding_mask(
    mask: Bool[Array, "B T S"],
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    window: int,
    start: Int[Array, ""] | int = 0,
) -> Bool[Array, "B T S"]:
    """Applies Gemma 2's sliding window to a prefix-LM mask.

    Keys `window` or more positions back are hidden, unless query and key attend to each other: these belong to one
    bidirectional block (image and prompt), which the window leaves whole, as in transformers. A suffix token does lose
    the image patches beyond its window. Distances are counted in positions, so padding does not count.

      window 2, prefix of three   query 0  1 1 1 0 0
                                        1  1 1 1 0 0
                                        2  1 1 1 0 0
                                        3  0 0 1 1 0
                                        4  0 0 0 1 1

    Args:
      mask: attention mask over all keys.
      query_positions, key_positions: positions of the real tokens.
      window: number of visible positions, the query's own included.
      start: slot of the first query among the keys.
    """
    near = query_positions[:, :, None] - key_positions[:, None, :] < window
    own = lax.dynamic_slice_in_dim(mask, start, mask.shape[1], axis=2)
    mutual = lax.dynamic_update_slice_in_dim(jnp.zeros_like(mask), own.swapaxes(1, 2), start, axis=2)
    return mask & (near | mutual)
