"""Layers both towers share: projections, norms, rotary positions, masked attention, and the scanned stack of blocks.

Axes, here and in every file of this package:
B batch, T query tokens, S key tokens, P image patches, L layers, D model width, F feed-forward width,
N query heads, K key/value heads, G query heads a key/value head (N = K G), H head width, V vocabulary, r adapter rank.

Numerics: kernels and the inputs of matrix products are in the compute dtype; sums over the residual stream, norms,
softmax and soft caps are in float32 whatever the compute dtype (Gemma's residuals reach 1e4 and more).
"""

import math
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from paligemma_jax.adapt.lora import low_rank
from train_jax.core import row_sharding

REMAT_POLICIES = {
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def cast(x: Array, dtype) -> Array:
    """Casts to `dtype`; finite numbers beyond float16 saturate there instead of overflowing to infinity.

    Infinities and NaN stay what they are: they are faults, and whoever watches for those must see them.
    """
    if x.dtype == dtype:
        return x
    if dtype == jnp.float16:
        limit = float(jnp.finfo(dtype).max)
        x = jnp.where(jnp.isinf(x), x, jnp.clip(x, -limit, limit))
    return x.astype(dtype)


def broadcast(x: Array, like: Array) -> Array:
    """Gives x leading axes of size 1 up to the rank of `like`: elsewhere, ranks that differ are a mistake."""
    return lax.expand_dims(x, range(like.ndim - x.ndim))


def fan_in_normal(num_contracted: int) -> Callable:
    """Truncated-free normal of variance 1 / (product of the contracted axes), for kernels shaped [in..., out...]."""

    def init(key, shape, dtype):
        fan_in = math.prod(shape[:num_contracted])
        return (jax.random.normal(key, shape, jnp.float32) / math.sqrt(fan_in)).astype(dtype)

    return init


class Projection(nnx.Module):
    """A linear map over one or more axes, with an optional low-rank update: y = x W + b + s (drop(x) A) B.

    The kernel is shaped [*in_shape, *out_shape]. Inside a stack of layers it has a leading layer axis that the scan
    takes off before the call. `adapt/lora/adapter.py` sets `lora_a` [*in_shape, r] and `lora_b` [r, *out_shape], None
    without an adapter; no other module looks at them, so base parameter names and checkpoints are the same with and
    without. Where layers of a stack differ in s, `lora_layer_scale` holds a factor a layer; `lora_magnitude`
    [*out_shape] is DoRA's. `adapt/` may put a module in the kernel's place, with `contract(x, keys)`, `dequantize()`,
    `shape` and `size`: a quantised kernel, or one with a gated difference.
    """

    def __init__(
        self,
        name: str,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        *,
        use_bias: bool = False,
        dtype: str = "float32",
        param_dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.name = name
        self.in_shape = tuple(in_shape)
        self.out_shape = tuple(out_shape)
        self.dtype = dtype
        init = fan_in_normal(len(in_shape))
        self.kernel = nnx.Param(init(rngs.params(), self.in_shape + self.out_shape, jnp.dtype(param_dtype)))
        self.bias = nnx.Param(jnp.zeros(self.out_shape, jnp.dtype(param_dtype))) if use_bias else nnx.data(None)
        self.lora_a = nnx.data(None)
        self.lora_b = nnx.data(None)
        self.lora_magnitude = nnx.data(None)
        self.lora_layer_scale = nnx.data(None)
        self.lora_scale = 1.0
        self.lora_dropout = 0.0
        self.lora_spec = None

    def __call__(self, x: Array, dropout_keys: Key[Array, " B"] | None = None, out_dtype=None) -> Array:
        """Maps [B, ..., *in_shape] to [B, ..., *out_shape].

        Args:
          x: input of any float dtype; multiplied in the compute dtype with float32 accumulation.
          dropout_keys: one key an example for the adapter's input dropout; None switches dropout off.
          out_dtype: dtype of the result, the compute dtype when None (residual branches ask for float32).
        """
        dtype = jnp.dtype(self.dtype)
        x = cast(x, dtype)
        base = y = self._base(x, dropout_keys)
        if self.bias is not None:
            y = y + broadcast(self.bias[...].astype(jnp.float32), y)
        if self.lora_a is not None:
            drops = dropout_keys is not None and self.lora_dropout > 0.0
            if drops:
                x = example_dropout(x, self.lora_dropout, fold_in_name(dropout_keys, self.name))
            low = contract(x, self.lora_a[...].astype(dtype), len(self.in_shape))
            low = contract(cast(low * self.scale, dtype), self.lora_b[...].astype(dtype), 1)
            if self.lora_magnitude is not None:
                gain = broadcast(self._gain(self.dense_kernel() + self.low_rank_delta()), y)
                low = gain * low + (gain - 1.0) * (self._base(x, dropout_keys) if drops else base)
            y = y + low
        return cast(y, jnp.dtype(out_dtype or dtype))

    def _base(self, x: Array, keys: Key[Array, " B"] | None) -> Array:
        """x W in float32."""
        if isinstance(self.kernel, nnx.Variable):
            return contract(x, self.kernel[...].astype(x.dtype), len(self.in_shape))
        return self.kernel.contract(x, keys)

    @property
    def scale(self) -> float | Array:
        """s of the low-rank update; of a stack whose layers differ, [L]."""
        return self.lora_scale if self.lora_layer_scale is None else self.lora_scale * self.lora_layer_scale[...]

    def low_rank_delta(self) -> Array:
        """s A B in float32, shaped as the kernel (with the layer axis, if stacked)."""
        return low_rank.delta(self.lora_a[...], self.lora_b[...], self.scale, len(self.in_shape))

    def dense_kernel(self) -> Array:
        """W in float32, dequantised where need be, with the layer axis, if stacked."""
        return (
            self.kernel[...].astype(jnp.float32) if isinstance(self.kernel, nnx.Variable) else self.kernel.dequantize()
        )

    def merged_kernel(self) -> Array:
        """The kernel that does alone what W and the adapter do: the updated one, rescaled with DoRA."""
        updated = self.dense_kernel() + self.low_rank_delta()
        if self.lora_magnitude is None:
            return updated
        gain, stack = self._gain(updated), updated.ndim - len(self.in_shape) - len(self.out_shape)
        return updated * lax.expand_dims(gain, range(stack, stack + len(self.in_shape)))

    def _gain(self, updated: Array) -> Array:
        num_axes = len(self.in_shape), len(self.out_shape)
        return low_rank.dora_gain(updated, self.lora_magnitude[...], self.scale, *num_axes)


def contract(x: Array, kernel: Array, num_contracted: int) -> Array:
    """Contracts the last axes of x with the first of kernel, accumulating in float32."""
    lhs = tuple(range(x.ndim - num_contracted, x.ndim))
    rhs = tuple(range(num_contracted))
    return lax.dot_general(x, kernel, ((lhs, rhs), ((), ())), preferred_element_type=jnp.float32)


def fold_in_name(keys: Key[Array, " B"], name: str | int | Array) -> Key[Array, " B"]:
    """Folds a name or a number into one key an example."""
    data = zlib.crc32(name.encode()) if isinstance(name, str) else name
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)


def example_dropout(x: Array, rate: float, keys: Key[Array, " B"]) -> Array:
    """Inverted dropout whose mask depends on the example's key alone, not on its place in the batch.

    So splitting a batch into micro-batches, or over devices, leaves the masks as they are.
    """
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, cast(x.astype(jnp.float32) / (1.0 - rate), x.dtype), jnp.zeros((), x.dtype))


class LayerNorm(nnx.Module):
    """Layer normalisation with scale and bias, computed in float32 (Ba et al. 2016)."""

    def __init__(self, width: int, *, eps: float = 1e-6, param_dtype: str = "float32"):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,), jnp.dtype(param_dtype)))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.dtype(param_dtype)))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        scale, bias = (broadcast(param[...].astype(jnp.float32), x) for param in (self.scale, self.bias))
        return x * scale + bias


class RMSNorm(nnx.Module):
    """Root-mean-square norm with Gemma's zero-centred scale: x / rms(x) * (1 + w), float32 (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, *, eps: float = 1e-6, param_dtype: str = "float32"):
        self.eps = eps
        self.scale = nnx.Param(jnp.zeros((width,), jnp.dtype(param_dtype)))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x = x.astype(jnp.float32)
        x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return x * broadcast(1.0 + self.scale[...].astype(jnp.float32), x)


def rotary(x: Float[Array, "B T N H"], positions: Int[Array, "B T"], theta: float) -> Float[Array, "B T N H"]:
    """Rotary positions on the two halves of the head width (Su et al. 2021; pairs are (i, i + H/2), as in Gemma)."""
    half = x.shape[-1] // 2
    timescale = theta ** (jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) / timescale[None, None, None]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def soft_cap(x: Array, cap: float | None) -> Array:
    """cap * tanh(x / cap), or x itself when cap is None."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"] | None,
    *,
    scale: float,
    cap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention with float32 scores and softmax.

    Args:
      q, k, v: in the compute dtype; N is a multiple of K, query head n reads key/value head n // (N / K).
      mask: True where query t may read key s; None reads everything. A row that may read nothing gets the mean of v.
      scale: factor on the scores, usually H ** -0.5.
      cap: soft cap on the scaled scores (Gemma 2), applied before the mask.
    """
    B, T, N, H = q.shape
    K, S = k.shape[2], k.shape[1]
    G = N // K
    # Heads that share keys become rows of one matrix: few large products, which matters on CPU and costs nothing else.
    q = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("BKQH,BKSH->BKQS", q, k, preferred_element_type=jnp.float32)
    scores = soft_cap(scores * scale, cap).reshape(B, K, G, T, S)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, -2.3819763e38)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(B, K, G * T, S)
    out = jnp.einsum("BKQS,BKSH->BKQH", weights, v)
    return out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def prefix_mask(mask_input: Bool[Array, "B S"], mask_ar: Int[Array, "B S"]) -> Bool[Array, "B S S"]:
    """Who may read whom, from big_vision's two rows: query i reads key j iff block(j) <= block(i) and both are real.

    `mask_ar` is 1 where a token opens a new block (is causal) and 0 where it shares the previous token's:

      mask_ar  1 1 1 1 1 1   causal
      mask_ar  0 0 0 1 1 1   prefix of three tokens that read one another, then causal
      mask_ar  1 0 1 0 1 0   blocks of two, causal among blocks

    Args:
      mask_input: True on real tokens, False on padding (either side).
      mask_ar: 0 or 1 as above.
    """
    block = jnp.cumsum(mask_ar.astype(jnp.int32), axis=1)
    visible = block[:, None, :] <= block[:, :, None]
    return visible & mask_input[:, None, :] & mask_input[:, :, None]


def make_stack(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """`depth` blocks as one module whose parameters have a leading layer axis."""

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def build(rngs):
        return make(rngs)

    return build(rngs)


def scan_stack(
    blocks: nnx.Module,
    call: Callable,
    carry,
    per_layer=None,
    *,
    remat: str = "none",
    unroll: bool = False,
    row_axes=0,
):
    """Runs `call(block, carry, x) -> (carry, y)` through the stacked blocks, with rematerialisation a block at a time.

    Scanning keeps one layer's weights and activations alive at a time and compiles one block, whatever the depth.

    Args:
      blocks: a module made by `make_stack`.
      call: pure function of one layer's module, the carry and that layer's slice of `per_layer`.
      carry: pytree threaded through the layers.
      per_layer: pytree whose leaves have a leading layer axis, or None.
      remat: "none" keeps activations for the backward pass, "block" recomputes each block from its input,
        "dots" keeps the results of matrix products without batch axes.
      unroll: compile the layers one after another instead of a loop: faster on CPU, slower to compile. A loop it is
        where weights are gathered from other devices.
      row_axes: where the carry's arrays have their rows, see row_sharding.pin_rows.

    Returns:
      The final carry and the stacked y.

    Raises:
      ValueError: remat is none of the above.
    """
    graph, params = nnx.split(blocks)

    def body(carry, inputs):
        layer, x = inputs
        block = nnx.merge(graph, row_sharding.gather(layer))
        carry, y = call(block, row_sharding.pin_rows(carry, row_axes), x)
        return row_sharding.pin_rows(carry, row_axes), y

    if remat == "none":
        body = row_sharding.recompute_gathered(body, params, stacked=True)
    else:
        if remat not in REMAT_POLICIES:
            raise ValueError(f"remat is {remat!r}, expected one of none, {', '.join(REMAT_POLICIES)}.")
        policy = row_sharding.without_weights(REMAT_POLICIES[remat], params, stacked=True)
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    # Layers one after another would be gathered all at once: nothing holds the compiler back.
    unroll = unroll and not row_sharding.gathers()
    return lax.scan(body, carry, (params, per_layer), unroll=unroll)
