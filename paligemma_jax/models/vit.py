"""The vision tower: the ViT of SigLIP and of CLIP, with learned positions. Axes: see models.

Zhai et al. 2023; Radford et al. 2021; Dosovitskiy et al. 2021.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from paligemma_jax.models import encoder_block
from paligemma_jax.models.norms import LayerNorm
from paligemma_jax.models.projection import Projection
from paligemma_jax.models.stack import make_stack


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes of a vision tower.

    Attributes:
      image_size: side of the square image in pixels. If it is not a multiple of `patch_size`, pixels right of and below
        the last whole patch are ignored (SigLIP So400m/14 at 384).
      class_token: whether the tower is CLIP's: a learned first token, a norm before the blocks, no bias on patches.
    """

    image_size: int = 224
    patch_size: int = 14
    width: int = 1152
    depth: int = 27
    mlp_dim: int = 4304
    num_heads: int = 16
    eps: float = 1e-6
    activation: str = "gelu_tanh"  # see encoder_block.ACTIVATIONS
    class_token: bool = False
    posemb: str = "learn"  # initial value of the learned positions: "learn" is normal noise, "sincos2d" sines
    remat: str = "none"  # see stack.scan_stack
    unroll: bool = False  # see stack.scan_stack
    dtype: str = "float32"  # compute dtype
    param_dtype: str = "float32"
    attention: str = "auto"  # the kernel, see attention.has_flash

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches per image."""
        return self.grid**2

    @property
    def num_tokens(self) -> int:
        """Patches, and the class token if there is one."""
        return self.num_patches + self.class_token

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.num_heads


class ViT(nnx.Module):
    """Patches, learned positions, blocks and final norm; returns all patch features (after CLIP's class token)."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        p, dtype = config.patch_size, jnp.dtype(config.param_dtype)
        self.patch_embedding = Projection(
            "vision/patch_embedding",
            (p, p, 3),
            (config.width,),
            use_bias=not config.class_token,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.position_embedding = nnx.Param(_initial_positions(config, rngs).astype(dtype))
        if config.class_token:
            noise = jax.random.normal(rngs.params(), (config.width,)) * config.width**-0.5
            self.class_embedding = nnx.Param(noise.astype(dtype))
            self.pre_layernorm = LayerNorm(config.width, eps=config.eps, param_dtype=config.param_dtype)
        self.layers = make_stack(lambda rngs: encoder_block.EncoderBlock(config, rngs=rngs), config.depth, rngs)
        self.post_layernorm = LayerNorm(config.width, eps=config.eps, param_dtype=config.param_dtype)

    def __call__(self, images: Float[Array, "B I I 3"], dropout_keys=None) -> tuple[Float[Array, "B S D"], dict]:
        """Encodes images.

        Args:
          images: float32 in the checkpoint's value range (SigLIP: [-1, 1]).
          dropout_keys: one key per example switches the randomness of training on; None is deterministic.

        Returns:
          Patch features after the final norm, float32, in row-major order, preceded by those of the class token if
          there is one; and the named intermediates `patches` (patch embedding), `embedded` (with positions), `blocks`
          (before the final norm) and `encoded` (the features).

        Raises:
          ValueError: images of another size.
        """
        config, out = self.config, {}
        B, height, width, _ = images.shape
        if (height, width) != (config.image_size, config.image_size):
            raise ValueError(
                f"images are {height} x {width} pixels, but the vision tower was built for {config.image_size} x "
                f"{config.image_size}: resize them, or load the model with image_size={height}."
            )
        g, p = config.grid, config.patch_size
        whole = images[:, : g * p, : g * p].reshape(B, g, p, g, p, 3)
        patches = whole.transpose(0, 1, 3, 2, 4, 5).reshape(B, g * g, p, p, 3)
        x = out["patches"] = self.patch_embedding(patches, dropout_keys, jnp.float32)
        if config.class_token:
            first = jnp.broadcast_to(self.class_embedding[...].astype(jnp.float32), (B, 1, config.width))
            x = jnp.concatenate([first, x], axis=1)
        x = out["embedded"] = x + self.position_embedding[...].astype(jnp.float32)[None]
        if config.class_token:
            x = self.pre_layernorm(x)
        x = out["blocks"] = self.run_layers(x, dropout_keys)
        x = out["encoded"] = self.post_layernorm(x)
        return x, out

    def run_layers(self, x: Float[Array, "B S D"], dropout_keys=None) -> Float[Array, "B S D"]:
        """Returns the residual stream after all blocks, float32."""
        config = self.config
        return encoder_block.run_blocks(
            self.layers, x, dropout_keys, depth=config.depth, remat=config.remat, unroll=config.unroll
        )


def _initial_positions(config: ViTConfig, rngs: nnx.Rngs) -> Float[Array, "S D"]:
    """Returns the initial value of the learned position table."""
    if config.posemb == "sincos2d" and not config.class_token:
        return sincos_2d(config.grid, config.width)
    if config.posemb == "learn":
        return jax.random.normal(rngs.params(), (config.num_tokens, config.width)) * config.width**-0.5
    raise ValueError(f"posemb is {config.posemb!r}, expected 'learn' or 'sincos2d' (not with a class token).")


def sincos_2d(grid: int, width: int, temperature: float = 10_000.0) -> Float[Array, "P D"]:
    """Returns sine and cosine positions on a square grid (MoCo v3), the initial value of learned ones."""
    y, x = np.mgrid[:grid, :grid].reshape(2, -1, 1)
    omega = 1.0 / temperature ** (np.arange(width // 4) / (width // 4 - 1))
    table = [f(axis * omega) for axis in (x, y) for f in (np.sin, np.cos)]
    return jnp.asarray(np.concatenate(table, axis=1), jnp.float32)


def resample_positions(positions: np.ndarray, new_grid: int, method: str) -> np.ndarray:
    """Resamples a square table of learned positions [P, D] to `new_grid` x `new_grid`.

    Args:
      positions: float32, row-major, P a square number.
      new_grid: patches per side.
      method: "bilinear" as in big_vision (corners aligned), "bicubic" as in transformers (torch's kernel with
        a = -0.75, half-pixel centers, clamped edges, no antialiasing).

    Raises:
      ValueError: an unknown method.
    """
    grid = round(positions.shape[0] ** 0.5)
    if grid == new_grid:
        return positions
    table = np.asarray(positions, np.float32).reshape(grid, grid, -1)
    if method == "bilinear":
        from scipy import ndimage  # slow to import, and few models are resampled

        zoom = (new_grid / grid, new_grid / grid, 1)
        table = np.asarray(ndimage.zoom(table, zoom, order=1))
    elif method == "bicubic":
        weights = _bicubic_weights(grid, new_grid)
        table = np.einsum("Yy,Xx,yxD->YXD", weights, weights, table)
    else:
        raise ValueError(f"position resampling {method!r} is unknown, expected 'bilinear' or 'bicubic'.")
    return table.reshape(new_grid**2, -1).astype(np.float32)


def _bicubic_weights(old: int, new: int, a: float = -0.75) -> np.ndarray:
    """Returns the matrix [new, old] of Keys' cubic convolution with half-pixel centers and clamped edges."""
    center = (np.arange(new) + 0.5) * old / new - 0.5
    base = np.floor(center).astype(int)
    weights = np.zeros((new, old))
    for offset in range(-1, 3):
        distance = np.abs(center - (base + offset))
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        value = np.where(distance <= 1, near, far)
        np.add.at(weights, (np.arange(new), np.clip(base + offset, 0, old - 1)), value)
    return weights
