"""The U-Net of ADM (Dhariwal and Nichol 2021), the model of Lipman et al. 2023 and of torchcfm's image recipes.

Residual blocks take time and label as a scale and shift of their second norm and may change the resolution in between;
attention stands at the resolutions asked for and in the middle. Axes: B batch, I side of an image, C channels.
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
class UNetConfig:
    """Sizes; the defaults are the paper's for CIFAR-10 (Lipman et al. 2023, table 3).

    Attributes:
      image_size, channels: of the images.
      width: channels at full resolution.
      multipliers: of the width, one a resolution, each half the one before.
      num_blocks: residual blocks a resolution ("depth").
      attention: sides of the feature maps that attend, such as (16, 8).
      head_width: channels of an attention head.
      num_classes, vector_width: what the model is told of every row, see layers.Condition.
      dropout: inside residual blocks.
      remat: recompute blocks in the backward pass.
      dtype: of the computation, "bfloat16" or "float16" say; norms and softmax take their sums in float32. None is that
        of images and parameters.
    """

    image_size: int = 32
    channels: int = 3
    width: int = 256
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    num_blocks: int = 2
    attention: tuple[int, ...] = (16,)
    head_width: int = 64
    num_classes: int | tuple[int, ...] = 0
    vector_width: int = 0
    dropout: int | float = 0.0
    remat: bool = False
    dtype: str | None = None

    def __post_init__(self):
        halvings = len(self.multipliers) - 1
        if self.image_size % 2**halvings:
            raise ValueError(f"images of {self.image_size} pixels cannot be halved {halvings} times.")
        sides = [self.image_size >> level for level in range(halvings + 1)]
        missing = sorted(set(self.attention) - set(sides))
        if missing:
            raise ValueError(f"attention at {missing}, but the feature maps have sides {sides}.")


def conv(
    features_in: int, features_out: int, size: int = 3, *, zero: bool = False, dtype: str | None, rngs: nnx.Rngs
) -> nnx.Conv:
    """A convolution that keeps the resolution."""
    init = dict(kernel_init=nnx.initializers.zeros_init()) if zero else {}
    return nnx.Conv(features_in, features_out, (size, size), padding="SAME", dtype=dtype, rngs=rngs, **init)


def group_norm(channels: int, dtype: str | None, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """32 groups; fewer in narrow models, of four channels at least (a group of one would undo every bias before it)."""
    groups = next(groups for groups in range(min(32, max(channels // 4, 1)), 0, -1) if channels % groups == 0)
    return nnx.GroupNorm(channels, num_groups=groups, epsilon=1e-5, dtype=dtype, rngs=rngs)


def upsample(x: Float[Array, "B I J C"]) -> Float[Array, "B 2*I 2*J C"]:
    """Twice the side, each pixel repeated."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def downsample(x: Float[Array, "B I J C"]) -> Float[Array, "B I//2 J//2 C"]:
    """Half the side, means of four."""
    B, height, width, C = x.shape
    return x.reshape(B, height // 2, 2, width // 2, 2, C).mean(axis=(2, 4))


RESIZE = {"up": upsample, "down": downsample, None: lambda x: x}


class ResBlock(nnx.Module):
    """norm, SiLU, (resize,) convolution; norm scaled and shifted by the condition, SiLU, dropout, zero convolution."""

    def __init__(
        self, name: str, channels_in: int, channels: int, config: UNetConfig, resize: str | None = None, *, rngs
    ):
        self.name, self.dropout, self.resize = name, config.dropout, resize
        dtype = config.dtype
        self.norm1 = group_norm(channels_in, dtype, rngs)
        self.conv1 = conv(channels_in, channels, dtype=dtype, rngs=rngs)
        self.condition = linear(4 * config.width, 2 * channels, dtype=dtype, rngs=rngs)
        self.norm2 = group_norm(channels, dtype, rngs)
        self.conv2 = conv(channels, channels, zero=True, dtype=dtype, rngs=rngs)
        self.skip = conv(channels_in, channels, 1, dtype=dtype, rngs=rngs) if channels != channels_in else None

    def __call__(self, x: Float[Array, "B ..."], c: Float[Array, "B E"], dropout_keys) -> Float[Array, "B ..."]:
        resize = RESIZE[self.resize]
        h = self.conv1(resize(jax.nn.silu(self.norm1(x))))
        scale, shift = jnp.split(self.condition(jax.nn.silu(c)), 2, axis=1)
        h = self.norm2(h) * (1 + scale[:, None, None]) + shift[:, None, None]
        h = self.conv2(drop(jax.nn.silu(h), self.dropout, dropout_keys, self.name))
        x = resize(x)
        return (x if self.skip is None else self.skip(x)) + h


class Attention(nnx.Module):
    """Self-attention over the pixels of a feature map; its output starts at zero."""

    def __init__(self, channels: int, config: UNetConfig, *, rngs: nnx.Rngs):
        head_width, dtype = config.head_width, config.dtype
        if channels % head_width:
            raise ValueError(f"{channels} channels do not divide into attention heads of {head_width}.")
        self.head_width = head_width
        self.norm = group_norm(channels, dtype, rngs)
        self.qkv_proj = linear(channels, 3 * channels, dtype=dtype, rngs=rngs)
        self.o_proj = linear(channels, channels, zero=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B I J C"]) -> Float[Array, "B I J C"]:
        B, height, width, C = x.shape
        heads = (B, height * width, 3, C // self.head_width, self.head_width)
        qkv = self.qkv_proj(self.norm(x)).reshape(heads)
        return x + self.o_proj(attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]).reshape(x.shape))


class Stage(nnx.Module):
    """A residual block and, where the resolution attends, attention."""

    def __init__(self, name, channels_in: int, channels: int, side: int, config: UNetConfig, resize=None, *, rngs):
        self.block = ResBlock(name, channels_in, channels, config, resize, rngs=rngs)
        attends = resize is None and side in config.attention
        self.attention = Attention(channels, config, rngs=rngs) if attends else None

    def __call__(self, x, c, dropout_keys):
        x = self.block(x, c, dropout_keys)
        return x if self.attention is None else self.attention(x)


class UNet(nnx.Module):
    """Velocity of images [B, size, size, channels]; the output starts at zero."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths = [config.width * multiplier for multiplier in config.multipliers]
        dtype = config.dtype
        told = config.num_classes, config.width, config.vector_width
        self.condition = Condition(4 * config.width, *told, dtype=dtype, rngs=rngs)
        self.inputs = conv(config.channels, config.width, dtype=dtype, rngs=rngs)
        down, skips, channels, side = [], [config.width], config.width, config.image_size
        for level, width in enumerate(widths):
            for index in range(config.num_blocks):
                down.append(Stage(f"down/{level}/{index}", channels, width, side, config, rngs=rngs))
                channels = width
                skips.append(channels)
            if level < len(widths) - 1:
                side //= 2
                down.append(Stage(f"down/{level}/half", channels, channels, side, config, "down", rngs=rngs))
                skips.append(channels)
        self.down = nnx.List(down)
        self.middle_in = ResBlock("middle/in", channels, channels, config, rngs=rngs)
        self.middle_attention = Attention(channels, config, rngs=rngs)
        self.middle_out = ResBlock("middle/out", channels, channels, config, rngs=rngs)
        up = []
        for level, width in reversed(list(enumerate(widths))):
            for index in range(config.num_blocks + 1):
                up.append(Stage(f"up/{level}/{index}", channels + skips.pop(), width, side, config, rngs=rngs))
                channels = width
            if level:
                side *= 2
                up.append(Stage(f"up/{level}/double", channels, channels, side, config, "up", rngs=rngs))
        self.up = nnx.List(up)
        self.norm = group_norm(channels, dtype, rngs)
        self.outputs = conv(channels, config.channels, zero=True, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        t,
        x: Float[Array, "B I I C"],
        labels: CheckedLabels | None = None,
        dropout_keys: Key[Array, " B"] | None = None,
    ) -> Float[Array, "B I I C"]:
        """See layers.py for the arguments."""
        size = self.config.image_size
        if x.shape[1:] != (size, size, self.config.channels):
            raise ValueError(f"images are {x.shape[1:]}, expected {(size, size, self.config.channels)}.")
        remat = self.config.remat
        c = row_sharding.apply_block(self.condition, batch_times(t, x), labels)
        h = row_sharding.apply_block(self.inputs, x)
        skips = [h]
        for stage in self.down:
            h = row_sharding.apply_block(stage, h, c, dropout_keys, remat=remat)
            skips.append(h)
        h = row_sharding.apply_block(self.middle_in, h, c, dropout_keys)
        h = row_sharding.apply_block(self.middle_attention, h)
        h = row_sharding.apply_block(self.middle_out, h, c, dropout_keys)
        for stage in self.up:
            if stage.block.resize is None:
                h = jnp.concatenate([h, skips.pop()], axis=-1)
            h = row_sharding.apply_block(stage, h, c, dropout_keys, remat=remat)
        return row_sharding.apply_block(self.outputs, jax.nn.silu(self.norm(h))).astype(x.dtype)
