"""The block of image and text encoders: pre-norm, attention with biases, two-layer MLP. Axes: see models.

One block serves SigLIP's and CLIP's towers, images and texts alike: they differ in sizes, mask, epsilon and activation.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from paligemma_jax.models.attention import attention
from paligemma_jax.models.dropout import fold_in_name
from paligemma_jax.models.norms import LayerNorm
from paligemma_jax.models.numerics import broadcast, cast
from paligemma_jax.models.projection import Projection
from paligemma_jax.models.stack import scan_stack


def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x), CLIP's approximation of GELU (Hendrycks & Gimpel 2016)."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": quick_gelu,
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


def check_activation(name: str) -> None:
    """Raises ValueError for a name that is none of ACTIVATIONS."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}, expected one of {', '.join(ACTIVATIONS)}.")


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
        self.q_proj = Projection(f"{name}/q_proj", (config.width,), heads, **options)
        self.k_proj = Projection(f"{name}/k_proj", (config.width,), heads, **options)
        self.v_proj = Projection(f"{name}/v_proj", (config.width,), heads, **options)
        self.out_proj = Projection(f"{name}/out_proj", heads, (config.width,), **options)

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
        out = attention(q, k, v, mask, scale=q.shape[-1] ** -0.5)
        return self.out_proj(out, dropout_keys, jnp.float32)

    def pool(self, query: Float[Array, " D"], x: Float[Array, "B S D"]) -> Float[Array, "B 1 D"]:
        """What `self` returns for one `query` that all rows share and `keys_from=x`, for a fraction of the work.

        Keys and values of the S positions need not be computed: q (W_k x + b_k) is (q W_k) x and a constant that the
        softmax does not see, and the mean of W_v x + b_v is W_v of the mean of x, and b_v. Of projections with plain
        kernels and no adapter (`is_plain`).
        """
        dtype = jnp.dtype(self.q_proj.dtype)
        x, q = cast(x, dtype), self.q_proj(query[None, None], None, jnp.float32)[0, 0]
        keys, values = (projection.kernel[...].astype(jnp.float32) for projection in (self.k_proj, self.v_proj))
        reader = cast(jnp.einsum("NH,DNH->ND", q * q.shape[-1] ** -0.5, keys), dtype)
        scores = jnp.einsum("ND,BSD->BNS", reader, x, preferred_element_type=jnp.float32)
        weights = cast(jax.nn.softmax(scores, axis=-1), dtype)
        mean = jnp.einsum("BNS,BSD->BND", weights, x, preferred_element_type=jnp.float32)
        out = jnp.einsum("BND,DNH->BNH", mean, values)
        out = out + broadcast(self.v_proj.bias[...].astype(jnp.float32), out)
        return self.out_proj(out[:, None], None, jnp.float32)

    @property
    def is_plain(self) -> bool:
        """Whether all is done by kernels and biases alone: nothing quantised, no adapter."""
        return all(
            type(projection) is Projection and isinstance(projection.kernel, nnx.Variable)
            for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        )


class Mlp(nnx.Module):
    """Two layers with the config's activation between them."""

    def __init__(self, config: BlockConfig, name: str = "vision", *, rngs: nnx.Rngs):
        check_activation(config.activation)
        options = dict(use_bias=True, dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs)
        self.activation = config.activation
        self.fc1 = Projection(f"{name}/fc1", (config.width,), (config.mlp_dim,), **options)
        self.fc2 = Projection(f"{name}/fc2", (config.mlp_dim,), (config.width,), **options)

    def __call__(self, x: Float[Array, "B T D"], dropout_keys=None) -> Float[Array, "B T D"]:
        hidden = ACTIVATIONS[self.activation](self.fc1(x, dropout_keys, jnp.float32))
        return self.fc2(hidden, dropout_keys, jnp.float32)


class Block(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: BlockConfig, name: str = "vision", *, rngs: nnx.Rngs):
        norm = dict(eps=config.eps, param_dtype=config.param_dtype)
        self.layer_norm1 = LayerNorm(config.width, **norm)
        self.self_attn = Attention(config, name, rngs=rngs)
        self.layer_norm2 = LayerNorm(config.width, **norm)
        self.mlp = Mlp(config, name, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], dropout_keys=None, *, mask: Bool[Array, "B T T"] | None = None
    ) -> Float[Array, "B T D"]:
        x = x + self.self_attn(self.layer_norm1(x), dropout_keys, mask=mask)
        return x + self.mlp(self.layer_norm2(x), dropout_keys)

    def last(self, x: Float[Array, "B T D"], *, mask: Bool[Array, "B T T"] | None = None) -> Float[Array, "B 1 D"]:
        """What the block makes of the last position, without computing the others."""
        source = self.layer_norm1(x)
        mask = None if mask is None else mask[:, -1:]
        x = x[:, -1:] + self.self_attn(source[:, -1:], mask=mask, keys_from=source)
        return x + self.mlp(self.layer_norm2(x))


def split_last(blocks: nnx.Module) -> tuple[nnx.Module, Block]:
    """A stack without its last block, and that block."""
    graph, parameters = nnx.split(blocks)
    parts = (jax.tree.map(lambda leaf, part=part: leaf[part], parameters) for part in (slice(-1), -1))
    before, last = (nnx.merge(graph, part) for part in parts)
    return before, last


def run_blocks(
    blocks: nnx.Module,
    x: Float[Array, "B T D"],
    dropout_keys=None,
    *,
    depth: int,
    mask: Bool[Array, "B T T"] | None = None,
    prompts: Float[Array, "K M D"] | None = None,
    start: int = 0,
    remat: str = "none",
    unroll: bool = False,
) -> Float[Array, "B T D"]:
    """A stack of `Block`s made by `layers.make_stack`, each layer with dropout keys of its own; see scan_stack.

    Args:
      blocks, dropout_keys, mask, remat, unroll: see scan_stack and Block.
      x: of the first layer; where there are prompts, its positions `start` to `start + M` hold `prompts[0]`.
      depth: number of layers.
      prompts: of the first K layers: before layer k, 1 <= k < K, what those positions hold is replaced by `prompts[k]`
        (deep prompts: Jia et al. 2022; Khattak et al. 2023).
      start: see x.
    """
    deep = None if prompts is None or len(prompts) == 1 else _deep_prompts(prompts, depth)

    def call(block, x, inputs):
        layer, deep = inputs
        if deep is not None:
            x = _replace(x, *deep, start)
        keys = None if dropout_keys is None else fold_in_name(dropout_keys, layer)
        return block(x, keys, mask=mask), None

    return scan_stack(blocks, call, x, (jnp.arange(depth), deep), remat=remat, unroll=unroll)[0]


def _deep_prompts(prompts: Float[Array, "K M D"], depth: int) -> tuple[Float[Array, "L M D"], Bool[Array, " L"]]:
    """Prompts of every layer, zeros beyond the K-th, and whether a layer takes them: the first has them already."""
    padded = jnp.pad(prompts, ((0, depth - len(prompts)), (0, 0), (0, 0)))
    return padded, (jnp.arange(depth) > 0) & (jnp.arange(depth) < len(prompts))


def _replace(
    x: Float[Array, "B T D"], prompt: Float[Array, "M D"], active: Bool[Array, ""], start: int
) -> Float[Array, "B T D"]:
    """x with positions from `start` on replaced by a layer's prompt, if it has one."""
    place = slice(start, start + len(prompt))
    return x.at[:, place].set(jnp.where(active, prompt[None], x[:, place]))
