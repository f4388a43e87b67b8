"""The vision tower: SigLIP's ViT, learned positions (Zhai et al. 2023; Dosovitskiy et al. 2021). Axes: layers.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage
from flax import nnx
from jaxtyping import Array, Float

from paligemma_jax.models import layers


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes of a vision tower. `image_size` is in pixels (square) and must be a multiple of `patch_size`."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1152
    depth: int = 27
    mlp_dim: int = 4304
    num_heads: int = 16
    eps: float = 1e-6
    posemb: str = "learn"  # initial value of the learned positions: "learn" = normal noise, "sincos2d" = sines
    remat: str = "none"  # see layers.scan_stack
    unroll: bool = False  # see layers.scan_stack
    dtype: str = "float32"  # compute dtype
    param_dtype: str = "float32"

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid**2

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads


class ViTAttention(nnx.Module):
    """Multi-head self-attention over all patches, with biases."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        heads = (config.num_heads, config.head_dim)
        options = dict(use_bias=True, dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs)
        self.q_proj = layers.Projection("vision/q_proj", (config.width,), heads, **options)
        self.k_proj = layers.Projection("vision/k_proj", (config.width,), heads, **options)
        self.v_proj = layers.Projection("vision/v_proj", (config.width,), heads, **options)
        self.out_proj = layers.Projection("vision/out_proj", heads, (config.width,), **options)

    def __call__(self, x: Float[Array, "B P D"], dropout_keys=None) -> Float[Array, "B P D"]:
        q, k, v = (project(x, dropout_keys) for project in (self.q_proj, self.k_proj, self.v_proj))
        out = layers.attention(q, k, v, None, scale=q.shape[-1] ** -0.5)
        return self.out_proj(out, dropout_keys, jnp.float32)


class ViTMlp(nnx.Module):
    """Two layers with tanh-approximated GELU."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        options = dict(use_bias=True, dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs)
        self.fc1 = layers.Projection("vision/fc1", (config.width,), (config.mlp_dim,), **options)
        self.fc2 = layers.Projection("vision/fc2", (config.mlp_dim,), (config.width,), **options)

    def __call__(self, x: Float[Array, "B P D"], dropout_keys=None) -> Float[Array, "B P D"]:
        hidden = jax.nn.gelu(self.fc1(x, dropout_keys, jnp.float32), approximate=True)
        return self.fc2(hidden, dropout_keys, jnp.float32)


class ViTBlock(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        norm = dict(eps=config.eps, param_dtype=config.param_dtype)
        self.layer_norm1 = layers.LayerNorm(config.width, **norm)
        self.self_attn = ViTAttention(config, rngs=rngs)
        self.layer_norm2 = layers.LayerNorm(config.width, **norm)
        self.mlp = ViTMlp(config, rngs=rngs)

    def __call__(self, x: Float[Array, "B P D"], dropout_keys=None) -> Float[Array, "B P D"]:
        x = x + self.self_attn(self.layer_norm1(x), dropout_keys)
        return x + self.mlp(self.layer_norm2(x), dropout_keys)


class ViT(nnx.Module):
    """Patches, learned positions, blocks, final norm. No class token and no pooling: every patch is returned."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        p, dtype = config.patch_size, jnp.dtype(config.param_dtype)
        self.patch_embedding = layers.Projection(
            "vision/patch_embedding",
            (p, p, 3),
            (config.width,),
            use_bias=True,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.position_embedding = nnx.Param(_initial_positions(config, rngs).astype(dtype))
        self.layers = layers.make_stack(lambda rngs: ViTBlock(config, rngs=rngs), config.depth, rngs)
        self.post_layernorm = layers.LayerNorm(config.width, eps=config.eps, param_dtype=config.param_dtype)

    def __call__(self, images: Float[Array, "B I I 3"], dropout_keys=None) -> tuple[Float[Array, "B P D"], dict]:
        """Encodes images in the checkpoint's value range (SigLIP: [-1, 1]).

        Returns:
          Patch features after the final norm, float32, in row-major order, and the named intermediates `patches`
          (patch embedding), `embedded` (with positions) and `encoded` (the features).
        """
        config, out = self.config, {}
        B, height, width, _ = images.shape
        if (height, width) != (config.image_size, config.image_size):
            raise ValueError(
                f"images are {height} x {width} pixels, but the vision tower was built for {config.image_size} x "
                f"{config.image_size}: resize them, or load the model with image_size={height}."
            )
        g, p = config.grid, config.patch_size
        patches = images.reshape(B, g, p, g, p, 3).transpose(0, 1, 3, 2, 4, 5).reshape(B, g * g, p, p, 3)
        x = out["patches"] = self.patch_embedding(patches, dropout_keys, jnp.float32)
        x = out["embedded"] = x + self.position_embedding[...].astype(jnp.float32)[None]

        def call(block, x, layer):
            keys = None if dropout_keys is None else layers.fold_in_name(dropout_keys, layer)
            return block(x, keys), None

        x, _ = layers.scan_stack(
            self.layers, call, x, jnp.arange(config.depth), remat=config.remat, unroll=config.unroll
        )
        x = out["encoded"] = self.post_layernorm(x)
        return x, out


def _initial_positions(config: ViTConfig, rngs: nnx.Rngs) -> Float[Array, "P D"]:
    """Starting value of the learned position table."""
    if config.posemb == "sincos2d":
        return sincos_2d(config.grid, config.width)
    if config.posemb == "learn":
        return jax.random.normal(rngs.params(), (config.num_patches, config.width)) * config.width**-0.5
    raise ValueError(f"posemb is {config.posemb!r}, expected 'learn' or 'sincos2d'.")


def sincos_2d(grid: int, width: int, temperature: float = 10_000.0) -> Float[Array, "P D"]:
    """Fixed sine and cosine positions on a square grid (MoCo v3), as a starting point for learned ones."""
    y, x = np.mgrid[:grid, :grid].reshape(2, -1, 1)
    omega = 1.0 / temperature ** (np.arange(width // 4) / (width // 4 - 1))
    table = [f(axis * omega) for axis in (x, y) for f in (np.sin, np.cos)]
    return jnp.asarray(np.concatenate(table, axis=1), jnp.float32)


def resample_positions(positions: np.ndarray, new_grid: int, method: str) -> np.ndarray:
    """Resamples a square table of learned positions [P, D] to `new_grid` x `new_grid`.

    Args:
      positions: float32, row-major, P a square number.
      new_grid: patches a side.
      method: "bilinear" as big_vision resamples (corners aligned), "bicubic" as transformers does (torch's kernel
        with a = -0.75, half-pixel centres, edge clamped, no antialiasing).

    Raises:
      ValueError: another method.
    """
    grid = round(positions.shape[0] ** 0.5)
    if grid == new_grid:
        return positions
    table = np.asarray(positions, np.float32).reshape(grid, grid, -1)
    if method == "bilinear":
        zoom = (new_grid / grid, new_grid / grid, 1)
        table = scipy.ndimage.zoom(table, zoom, order=1)
    elif method == "bicubic":
        weights = _bicubic_weights(grid, new_grid)
        table = np.einsum("Yy,Xx,yxD->YXD", weights, weights, table)
    else:
        raise ValueError(f"position resampling {method!r} is unknown, expected 'bilinear' or 'bicubic'.")
    return table.reshape(new_grid**2, -1).astype(np.float32)


def _bicubic_weights(old: int, new: int, a: float = -0.75) -> np.ndarray:
    """Matrix [new, old] of Keys' cubic convolution with half-pixel centres and clamped edges."""
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
