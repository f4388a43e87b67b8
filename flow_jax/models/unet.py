"""The U-Net of ADM (Dhariwal and Nichol 2021), the model of Lipman et al. 2023 and of torchcfm's image recipes.

Time and label scale and shift the second norm of each residual block. A residual block may also change the resolution.
There is attention at chosen resolutions and in the middle. Axes: B batch, I side of an image, C channels.
"""

import dataclasses
import functools

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
      multipliers: of the width, one per resolution; each resolution is half the one before.
      num_blocks: residual blocks per resolution ("depth").
      attention: sides of the feature maps with attention, such as (16, 8).
      head_width: channels of an attention head.
      num_classes, vector_width: kind of condition, see layers.Condition.
      dropout: rate inside residual blocks.
      remat: recompute blocks in the backward pass.
      dtype: of the computation, such as "bfloat16" or "float16"; norms and softmax are computed in float32. None: the
        dtype of images and parameters.
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
        widths = [self.width * multiplier for multiplier in self.multipliers]
        attended = [width for width, side in zip(widths, sides, strict=True) if side in self.attention]
        for channels in [*attended, widths[-1]]:  # the last are those of the middle
            if channels % self.head_width:
                raise ValueError(f"{channels} channels cannot be divided into attention heads of {self.head_width}.")


def conv(
    features_in: int, features_out: int, size: int = 3, *, zero: bool = False, dtype: str | None, rngs: nnx.Rngs
) -> nnx.Conv:
    """Returns a convolution that keeps the resolution; with `zero` its kernel starts at zero."""
    make = functools.partial(nnx.Conv, kernel_init=nnx.initializers.zeros_init()) if zero else nnx.Conv
    return make(features_in, features_out, (size, size), padding="SAME", dtype=dtype, rngs=rngs)


def group_norm(channels: int, dtype: str | None, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """Returns a norm of 32 groups, or of fewer with at least 4 channels: in a group of one any bias would cancel."""
    groups = next(groups for groups in range(min(32, max(channels // 4, 1)), 0, -1) if channels % groups == 0)
    return nnx.GroupNorm(channels, num_groups=groups, epsilon=1e-5, dtype=dtype, rngs=rngs)


def upsample(x: Float[Array, "B I J C"]) -> Float[Array, "B 2*I 2*J C"]:
    """Doubles the side by repeating pixels."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def downsample(x: Float[Array, "B I J C"]) -> Float[Array, "B I//2 J//2 C"]:
    """Halves the side by averaging 2 x 2 pixels."""
    B, height, width, C = x.shape
    return x.reshape(B, height // 2, 2, width // 2, 2, C).mean(axis=(2, 4))


RESIZE = {"up": upsample, "down": downsample, None: lambda x: x}


class ResBlock(nnx.Module):
    """A residual block whose second norm the condition scales and shifts; its last convolution starts at zero."""

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
        """Returns the block's output for x and condition vectors c."""
        resize = RESIZE[self.resize]
        h = self.conv1(resize(jax.nn.silu(self.norm1(x))))
        scale, shift = jnp.split(self.condition(jax.nn.silu(c)), 2, axis=1)
        h = self.norm2(h) * (1 + scale[:, None, None]) + shift[:, None, None]
        h = self.conv2(drop(jax.nn.silu(h), self.dropout, dropout_keys, self.name))
        x = resize(x)
        return (x if self.skip is None else self.skip(x)) + h


class SpatialAttention(nnx.Module):
    """Self-attention over the pixels of a feature map; its output starts at zero."""

    def __init__(self, channels: int, config: UNetConfig, *, rngs: nnx.Rngs):
        head_width, dtype = config.head_width, config.dtype
        self.head_width = head_width
        self.norm = group_norm(channels, dtype, rngs)
        self.qkv_proj = linear(channels, 3 * channels, dtype=dtype, rngs=rngs)
        self.o_proj = linear(channels, channels, zero=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B I J C"]) -> Float[Array, "B I J C"]:
        """Returns x plus its attention."""
        B, height, width, C = x.shape
        heads = (B, height * width, 3, C // self.head_width, self.head_width)
        qkv = self.qkv_proj(self.norm(x)).reshape(heads)
        return x + self.o_proj(attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]).reshape(x.shape))


class Stage(nnx.Module):
    """A residual block, followed by attention at the resolutions that have it."""

    def __init__(self, name, channels_in: int, channels: int, side: int, config: UNetConfig, resize=None, *, rngs):
        self.block = ResBlock(name, channels_in, channels, config, resize, rngs=rngs)
        has_attention = resize is None and side in config.attention
        self.attention = SpatialAttention(channels, config, rngs=rngs) if has_attention else None

    def __call__(self, x, c, dropout_keys):
        """Returns the stage's output for x and condition vectors c."""
        x = self.block(x, c, dropout_keys)
        return x if self.attention is None else self.attention(x)


class UNet(nnx.Module):
    """A U-Net that returns the velocity of images [B, size, size, channels]; the output starts at zero.

    `model(t, x, labels=None, dropout_keys=None)`; layers.py describes the arguments.
    """

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths = [config.width * multiplier for multiplier in config.multipliers]
        dtype = config.dtype
        sizes = config.num_classes, config.width, config.vector_width
        self.condition = Condition(4 * config.width, *sizes, dtype=dtype, rngs=rngs)
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
        self.middle_attention = SpatialAttention(channels, config, rngs=rngs)
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
        """Returns the velocity; layers.py describes the arguments."""
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
