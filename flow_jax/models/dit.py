"""DiT (Peebles and Xie 2023): a transformer over patches whose norms are scaled and shifted by time and label.

Axes: B batch, T patches, N heads, H head width, D model width. The gates of all branches and the output start at zero
("adaLN-Zero"). Blocks are stacked on a leading axis and scanned.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from flow_jax.arrays import CheckedLabels
from flow_jax.models.layers import Condition, attend, batch_times, drop, linear
from train_jax.core import row_sharding


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Sizes; the paper's S, B, L, XL have widths 384, 768, 1024, 1152, depths 12, 12, 24, 28, heads 6, 12, 16, 16.

    `num_classes` and `vector_width` define the kind of condition, see layers.Condition.
    """

    image_size: int = 32
    channels: int = 3
    patch_size: int = 2
    width: int = 384
    depth: int = 12
    num_heads: int = 6
    num_classes: int | tuple[int, ...] = 0
    vector_width: int = 0
    dropout: int | float = 0.0
    remat: bool = False
    dtype: str | None = None  # of the computation, see UNetConfig

    def __post_init__(self):
        if self.image_size % self.patch_size or self.width % self.num_heads or self.width % 4:
            raise ValueError(
                f"patches of {self.patch_size} must divide images of {self.image_size} pixels, and {self.num_heads} "
                f"heads and 4 the width {self.width}."
            )

    @property
    def grid(self) -> int:
        """Patches along each side of an image."""
        return self.image_size // self.patch_size


def sincos_positions(grid: int, width: int) -> Float[Array, "T D"]:
    """Returns fixed position embeddings of a square grid: half the channels encode the row, half the column."""
    frequencies = 1.0 / 10_000 ** (jnp.arange(width // 4) / (width // 4))
    angles = jnp.arange(grid)[:, None] * frequencies[None]
    one = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)  # [grid, D / 2]
    rows, columns = jnp.repeat(one, grid, axis=0), jnp.tile(one, (grid, 1))
    return jnp.concatenate([rows, columns], axis=1)


def modulate(x: Float[Array, "B T D"], shift: Float[Array, "B D"], scale: Float[Array, "B D"]) -> Float[Array, "B T D"]:
    """Returns x (1 + scale) + shift."""
    return x * (1 + scale[:, None]) + shift[:, None]


def norm(config: DiTConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Returns a layer norm without parameters, in place of which `modulate` scales and shifts."""
    return nnx.LayerNorm(config.width, use_bias=False, use_scale=False, epsilon=1e-6, dtype=config.dtype, rngs=rngs)


class DiTBlock(nnx.Module):
    """Attention and a two-layer perceptron, each with a modulated norm and a gate."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        D, dtype = config.width, config.dtype
        self.config = config
        self.norm1, self.norm2 = norm(config, rngs), norm(config, rngs)
        self.qkv_proj = linear(D, 3 * D, dtype=dtype, rngs=rngs)
        self.o_proj = linear(D, D, dtype=dtype, rngs=rngs)
        self.fc1 = linear(D, 4 * D, dtype=dtype, rngs=rngs)
        self.fc2 = linear(4 * D, D, dtype=dtype, rngs=rngs)
        self.modulation = linear(D, 6 * D, zero=True, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], c: Float[Array, "B D"], dropout_keys: Key[Array, " B"] | None
    ) -> Float[Array, "B T D"]:
        """Returns the block's output for x and condition vectors c."""
        config = self.config
        B, T, D = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(self.modulation(jax.nn.silu(c)), 6, axis=1)
        heads = (B, T, 3, config.num_heads, D // config.num_heads)
        qkv = self.qkv_proj(modulate(self.norm1(x), shift1, scale1)).reshape(heads)
        attended = self.o_proj(attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]).reshape(B, T, D))
        x = x + gate1[:, None] * drop(attended, config.dropout, dropout_keys, "attention")
        hidden = jax.nn.gelu(self.fc1(modulate(self.norm2(x), shift2, scale2)), approximate=True)
        return x + gate2[:, None] * drop(self.fc2(hidden), config.dropout, dropout_keys, "mlp")


class DiT(nnx.Module):
    """A DiT that returns the velocity of images [B, size, size, channels]; the output starts at zero.

    `model(t, x, labels=None, dropout_keys=None)`; layers.py describes the arguments.
    """

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        p, D, dtype = config.patch_size, config.width, config.dtype
        self.config = config
        self.patch_embedding = linear(p * p * config.channels, D, dtype=dtype, rngs=rngs)
        self.condition = Condition(D, config.num_classes, vector_width=config.vector_width, dtype=dtype, rngs=rngs)

        @nnx.split_rngs(splits=config.depth)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs):
            return DiTBlock(config, rngs=rngs)

        self.layers = stack(rngs)
        self.norm = norm(config, rngs)
        self.modulation = linear(D, 2 * D, zero=True, dtype=dtype, rngs=rngs)
        self.outputs = linear(D, p * p * config.channels, zero=True, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        t,
        x: Float[Array, "B I I C"],
        labels: CheckedLabels | None = None,
        dropout_keys: Key[Array, " B"] | None = None,
    ) -> Float[Array, "B I I C"]:
        """Returns the velocity; layers.py describes the arguments."""
        config, (B, height, width, C) = self.config, x.shape
        if (height, width, C) != (config.image_size, config.image_size, config.channels):
            raise ValueError(
                f"images are {height} x {width} x {C}, but the model was built for {config.image_size} x "
                f"{config.image_size} x {config.channels}."
            )
        g, p = config.grid, config.patch_size
        patches = x.reshape(B, g, p, g, p, C).transpose(0, 1, 3, 2, 4, 5).reshape(B, g * g, p * p * C)
        h = row_sharding.apply_block(self.patch_embedding, patches)
        h = h + sincos_positions(g, config.width)[None].astype(h.dtype)
        c = row_sharding.apply_block(self.condition, batch_times(t, x), labels)
        h = self._blocks(h, c, dropout_keys)
        shift, scale = jnp.split(row_sharding.apply_block(self.modulation, jax.nn.silu(c)), 2, axis=1)
        out = row_sharding.apply_block(self.outputs, modulate(self.norm(h), shift, scale)).astype(x.dtype)
        return out.reshape(B, g, g, p, p, C).transpose(0, 1, 3, 2, 4, 5).reshape(x.shape)

    def _blocks(self, h, c, dropout_keys):
        """Applies the stack of blocks by a scan."""
        graph, state = nnx.split(self.layers)

        def step(h, inputs):
            layer, state = inputs
            keys = None
            if dropout_keys is not None:
                keys = jax.vmap(lambda key: jax.random.fold_in(key, layer))(dropout_keys)
            block = nnx.merge(graph, row_sharding.gather(state))
            return row_sharding.pin_rows(block(row_sharding.pin_rows(h), c, keys)), None

        step = jax.checkpoint(step) if self.config.remat else row_sharding.recompute_gathered(step, state, stacked=True)
        return jax.lax.scan(step, h, (jnp.arange(self.config.depth), state))[0]
