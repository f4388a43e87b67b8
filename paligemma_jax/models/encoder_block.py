"""The transformer block of image and text encoders: pre-norm, attention with biases, two-layer MLP. Axes: see models.

The image and text towers of SigLIP and CLIP share it; they differ in sizes, mask, epsilon and activation.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from paligemma_jax.models import numerics
from paligemma_jax.models.attention import attention, has_short, short_attention
from paligemma_jax.models.dropout import fold_in_name
from paligemma_jax.models.norms import LayerNorm
from paligemma_jax.models.projection import PROJECTED, Projection, contract, is_plain
from paligemma_jax.models.stack import MLP, scan_stack
from train_jax.core import devices


def quick_gelu(x: Array) -> Array:
    """Returns x sigmoid(1.702 x), CLIP's approximation of GELU (Hendrycks & Gimpel 2016)."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": quick_gelu,
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


def check_activation(name: str) -> None:
    """Raises ValueError for a name that is not in ACTIVATIONS."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}, expected one of {', '.join(ACTIVATIONS)}.")


def activate(name: str, x: Array, factor: Array | None = None) -> Array:
    """Returns act(x) in float32, times `factor` if given; the backward pass saves the arguments alone.

    Autodiff would save every step of the function, in float32: five arrays for `gelu_tanh`. So would `jax.checkpoint`
    inside another one whose policy saves everything, as of blocks with gathered weights.
    """
    return _activate(name, x, factor)


def _plain_activate(name: str, x: Array, factor: Array | None) -> Array:
    y = ACTIVATIONS[name](x.astype(jnp.float32))
    return y if factor is None else y * factor.astype(jnp.float32)


_activate: Any = jax.custom_vjp(_plain_activate, nondiff_argnums=(0,))


def _activate_forward(name: str, x: Array, factor: Array | None):
    return _plain_activate(name, x, factor), (x, factor)


def _activate_backward(name: str, arguments: tuple[Array, Array | None], cotangent: Array):
    _, pull = jax.vjp(functools.partial(_plain_activate, name), *arguments)
    return pull(cotangent)


_activate.defvjp(_activate_forward, _activate_backward)


@runtime_checkable
class BlockConfig(Protocol):
    """The fields of a tower's config that a block uses; `head_dim` times `num_heads` is the width."""

    @property
    def width(self) -> int:
        """D, the width of the residual stream."""
        ...

    @property
    def mlp_dim(self) -> int:
        """F, the width of the MLP's hidden layer."""
        ...

    @property
    def num_heads(self) -> int:
        """N, the number of attention heads."""
        ...

    @property
    def head_dim(self) -> int:
        """H, the width of one attention head."""
        ...

    @property
    def eps(self) -> float:
        """Epsilon of the layer norms."""
        ...

    @property
    def activation(self) -> str:
        """Activation of the MLP, a key of ACTIVATIONS."""
        ...

    @property
    def attention(self) -> str:
        """The attention kernel, see attention.has_flash."""
        ...

    @property
    def dtype(self) -> str:
        """Compute dtype, to which inputs of matrix products are cast."""
        ...

    @property
    def param_dtype(self) -> str:
        """Dtype of new parameters."""
        ...


class EncoderAttention(nnx.Module):
    """Multi-head attention with biases; `name` is the tower's, on which the dropout of its projections depends."""

    def __init__(self, config: BlockConfig, name: str = "vision", *, rngs: nnx.Rngs):
        self.kernel = config.attention
        width, heads = (config.width,), (config.num_heads, config.head_dim)
        self.q_proj = _projection(config, f"{name}/q_proj", width, heads, rngs)
        self.k_proj = _projection(config, f"{name}/k_proj", width, heads, rngs)
        self.v_proj = _projection(config, f"{name}/v_proj", width, heads, rngs)
        self.out_proj = _projection(config, f"{name}/out_proj", heads, width, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        dropout_keys=None,
        *,
        mask: Bool[Array, "B _ S"] | None = None,
        keys_from: Float[Array, "B S D"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attends to x, or to `keys_from`; `mask` is as of `attention`."""
        num_heads, head_dim = self.q_proj.out_shape
        if keys_from is None and has_short(self.kernel, x.shape[1], num_heads, head_dim, self.q_proj.dtype, mask):
            q, k, v = (projection.flat(x, dropout_keys) for projection in (self.q_proj, self.k_proj, self.v_proj))
            out = short_attention(q, k, v, mask, num_heads=num_heads, scale=head_dim**-0.5)
            return self.out_proj.flat(out, dropout_keys, jnp.float32)
        source = x if keys_from is None else keys_from
        q, k, v = self.q_proj(x, dropout_keys), self.k_proj(source, dropout_keys), self.v_proj(source, dropout_keys)
        out = attention(q, k, v, mask, scale=q.shape[-1] ** -0.5, kernel=self.kernel)
        return self.out_proj(out, dropout_keys, jnp.float32)

    def pool(self, query: Float[Array, " D"], x: Float[Array, "B S D"]) -> Float[Array, "B 1 D"]:
        """Returns `self(query, keys_from=x)` for one `query` shared by all rows, without computing keys and values.

        The score q (W_k x + b_k) is (q W_k) x up to a constant, which the softmax ignores; the weighted mean of
        W_v x + b_v is W_v (weighted mean of x) + b_v. Requires `has_plain_kernels`.
        """
        dtype = jnp.dtype(self.q_proj.dtype)
        x, q = numerics.cast(x, dtype), self.q_proj(query[None, None], None, jnp.float32)[0, 0]
        w_k, w_v = (projection.kernel[...].astype(jnp.float32) for projection in (self.k_proj, self.v_proj))
        q_w_k = numerics.cast(jnp.einsum("NH,DNH->ND", q * q.shape[-1] ** -0.5, w_k), dtype)
        scores = jnp.einsum("ND,BSD->BNS", q_w_k, x, preferred_element_type=jnp.float32)
        weights = numerics.cast(jax.nn.softmax(scores, axis=-1), dtype)
        mean = jnp.einsum("BNS,BSD->BND", weights, x, preferred_element_type=jnp.float32)
        out = self.v_proj.add_bias(jnp.einsum("BND,DNH->BNH", mean, w_v))
        return self.out_proj(out[:, None], None, jnp.float32)

    @property
    def has_plain_kernels(self) -> bool:
        """Whether every projection is a `Projection` itself, no subclass, whose kernel is one array."""
        return all(is_plain(projection) for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj))


class EncoderMlp(nnx.Module):
    """Two layers with the config's activation between them."""

    def __init__(self, config: BlockConfig, name: str = "vision", *, rngs: nnx.Rngs):
        check_activation(config.activation)
        self.activation = config.activation
        self.fc1 = _projection(config, f"{name}/fc1", (config.width,), (config.mlp_dim,), rngs)
        self.fc2 = _projection(config, f"{name}/fc2", (config.mlp_dim,), (config.width,), rngs)

    def __call__(self, x: Float[Array, "B T D"], dropout_keys=None) -> Float[Array, "B T D"]:
        """Returns the MLP's output in float32."""
        hidden = checkpoint_name(self.fc1(x, dropout_keys), MLP)
        if is_plain(self.fc2) and hidden.dtype != jnp.float32 and devices.platform() == "tpu":
            kernel = self.fc2.kernel[...].astype(hidden.dtype)
            return self.fc2.add_bias(_activated_product(self.activation, hidden, kernel))
        return self.fc2(activate(self.activation, hidden), dropout_keys, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _activated_product(activation: str, x: Array, kernel: Array) -> Array:
    """Returns act(x) W in float32; the backward pass computes act(x) again.

    XLA on TPUs would compute x, itself a product, within this one, again for each tile of the result. In the backward
    pass, where x has been saved, it reads x within the products.
    """
    return _plain_activated_product(activation, numerics.materialized(x), kernel)


def _plain_activated_product(activation: str, x: Array, kernel: Array) -> Array:
    return contract(numerics.cast(activate(activation, x), kernel.dtype), kernel, 1)


def _activated_product_backward(activation: str, arguments: tuple[Array, Array], cotangent: Array):
    _, pull = jax.vjp(functools.partial(_plain_activated_product, activation), *arguments)
    return pull(cotangent)


_activated_product.defvjp(
    lambda activation, x, kernel: (_activated_product(activation, x, kernel), (x, kernel)), _activated_product_backward
)


class EncoderBlock(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: BlockConfig, name: str = "vision", *, rngs: nnx.Rngs):
        self.layer_norm1 = LayerNorm(config.width, eps=config.eps, param_dtype=config.param_dtype)
        self.self_attn = EncoderAttention(config, name, rngs=rngs)
        self.layer_norm2 = LayerNorm(config.width, eps=config.eps, param_dtype=config.param_dtype)
        self.mlp = EncoderMlp(config, name, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        dropout_keys=None,
        *,
        mask: Bool[Array, "B _ T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the residual stream after the block, in float32."""
        x = checkpoint_name(x + self.self_attn(self.layer_norm1(x), dropout_keys, mask=mask), PROJECTED)
        return x + self.mlp(self.layer_norm2(x), dropout_keys)

    def last(self, x: Float[Array, "B T D"], *, mask: Bool[Array, "B _ T"] | None = None) -> Float[Array, "B 1 D"]:
        """Returns the block's output at the last position without computing the others."""
        source = self.layer_norm1(x)
        mask = None if mask is None else mask[:, -1:]
        x = x[:, -1:] + self.self_attn(source[:, -1:], mask=mask, keys_from=source)
        return x + self.mlp(self.layer_norm2(x))


def _projection(
    config: BlockConfig, name: str, in_shape: tuple[int, ...], out_shape: tuple[int, ...], rngs: nnx.Rngs
) -> Projection:
    """Makes a projection with bias and the config's dtypes."""
    return Projection(
        name, in_shape, out_shape, use_bias=True, dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs
    )


def split_last(blocks: EncoderBlock) -> tuple[EncoderBlock, EncoderBlock]:
    """Splits a stack of blocks into the stack without its last block, and that block."""
    graph, parameters = nnx.split(blocks)
    parts = (jax.tree.map(lambda leaf, part=part: leaf[part], parameters) for part in (slice(-1), -1))
    before, last = (cast(EncoderBlock, nnx.merge(graph, part)) for part in parts)  # merge is typed as any module
    return before, last


def run_blocks(
    blocks: nnx.Module,
    x: Float[Array, "B T D"],
    dropout_keys=None,
    *,
    depth: int,
    mask: Bool[Array, "B _ T"] | None = None,
    remat: str = "none",
    unroll: bool = False,
) -> Float[Array, "B T D"]:
    """Runs a stack of `EncoderBlock`s made by `make_stack`, with the layer's number folded into its dropout keys.

    Args:
      blocks, dropout_keys, mask, remat, unroll: see scan_stack and EncoderBlock.
      x: input of the first layer.
      depth: number of layers.
    """

    def call(block, x, layer):
        keys = None if dropout_keys is None else fold_in_name(dropout_keys, layer)
        return block(x, keys, mask=mask), None

    return scan_stack(blocks, call, x, jnp.arange(depth), remat=remat, unroll=unroll)[0]
