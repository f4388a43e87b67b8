"""The block of image and text encoders: pre-norm, attention with biases, two-layer MLP. Axes: layers.py.

One block serves SigLIP's and CLIP's towers, images and texts alike: they differ in sizes, mask, epsilon and activation.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from paligemma_jax.models import layers


def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x), CLIP's approximation of GELU (Hendrycks & Gimpel 2016)."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": quick_gelu,
}


@runtime_checkable
class BlockConfig(Protocol):
    """What a block reads of a tower's config; `head_dim` times `num_heads` is the width."""

    width: int
    mlp_dim: int
    num_heads: int
    eps: float
    activation: str
    dtype: str
    param_dtype: str

    @property
    def head_dim(self) -> int: ...


class Attention(nnx.Module):
    """Multi-head attention with biases; `name` is the tower's, for the adapters' dropout keys."""

    def __init__(self, config: BlockConfig, name: str = "vision", *, rngs: nnx.Rngs):
        heads = (config.num_heads, config.head_dim)
        options = dict(use_bias=True, dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs)
        self.q_proj = layers.Projection(f"{name}/q_proj", (config.width,), heads, **options)
        self.k_proj = layers.Projection(f"{name}/k_proj", (config.width,), heads, **options)
        self.v_proj = layers.Projection(f"{name}/v_proj", (config.width,), heads, **options)
        self.out_proj = layers.Projection(f"{name}/out_proj", heads, (config.width,), **options)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        dropout_keys=None,
        *,
        mask: Bool[Array, "B T S"] | None = None,
        keys_from: Float[Array, "B S D"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Self-attention, or attention to `keys_from`; `mask` is True where query t may read key s, None everywhere."""
        source = x if keys_from is None else keys_from
        q, k, v = self.q_proj(x, dropout_keys), self.k_proj(source, dropout_keys), self.v_proj(source, dropout_keys)
        out = layers.attention(q, k, v, mask, scale=q.shape[-1] ** -0.5)
        return self.out_proj(out, dropout_keys, jnp.float32)


class Mlp(nnx.Module):
    """Two layers with the config's activation between them."""

    def __init__(self, config: BlockConfig, name: str = "vision", *, rngs: nnx.Rngs):
        if config.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {config.activation!r}, expected one of {', '.join(ACTIVATIONS)}.")
        options = dict(use_bias=True, dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs)
        self.activation = config.activation
        self.fc1 = layers.Projection(f"{name}/fc1", (config.width,), (config.mlp_dim,), **options)
        self.fc2 = layers.Projection(f"{name}/fc2", (config.mlp_dim,), (config.width,), **options)

    def __call__(self, x: Float[Array, "B T D"], dropout_keys=None) -> Float[Array, "B T D"]:
        hidden = ACTIVATIONS[self.activation](self.fc1(x, dropout_keys, jnp.float32))
        return self.fc2(hidden, dropout_keys, jnp.float32)


class Block(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: BlockConfig, name: str = "vision", *, rngs: nnx.Rngs):
        norm = dict(eps=config.eps, param_dtype=config.param_dtype)
        self.layer_norm1 = layers.LayerNorm(config.width, **norm)
        self.self_attn = Attention(config, name, rngs=rngs)
        self.layer_norm2 = layers.LayerNorm(config.width, **norm)
        self.mlp = Mlp(config, name, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], dropout_keys=None, *, mask: Bool[Array, "B T T"] | None = None
    ) -> Float[Array, "B T D"]:
        x = x + self.self_attn(self.layer_norm1(x), dropout_keys, mask=mask)
        return x + self.mlp(self.layer_norm2(x), dropout_keys)


def run_blocks(
    blocks: nnx.Module,
    x: Float[Array, "B T D"],
    dropout_keys=None,
    *,
    depth: int,
    mask: Bool[Array, "B T T"] | None = None,
    remat: str = "none",
    unroll: bool = False,
) -> Float[Array, "B T D"]:
    """A stack of `Block`s made by `layers.make_stack`, each layer with dropout keys of its own; see scan_stack."""

    def call(block, x, layer):
        keys = None if dropout_keys is None else layers.fold_in_name(dropout_keys, layer)
        return block(x, keys, mask=mask), None

    return layers.scan_stack(blocks, call, x, jnp.arange(depth), remat=remat, unroll=unroll)[0]
