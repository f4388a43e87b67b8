"""The linear layer of every tower. Axes: see models."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Key

from paligemma_jax.adapt.lora import low_rank
from paligemma_jax.models.dropout import example_dropout, fold_in_name
from paligemma_jax.models.numerics import broadcast, cast


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
