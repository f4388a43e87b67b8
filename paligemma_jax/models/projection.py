"""The linear layer of every tower. Axes: see models."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Key

from paligemma_jax.models.numerics import broadcast, cast


def fan_in_normal(num_contracted: int) -> Callable:
    """Returns an initializer: normal of variance 1 / (product of the contracted axes), for kernels [in..., out...]."""

    def init(key, shape, dtype):
        fan_in = math.prod(shape[:num_contracted])
        return (jax.random.normal(key, shape, jnp.float32) / math.sqrt(fan_in)).astype(dtype)

    return init


class Projection(nnx.Module):
    """A linear map over one or more axes: y = x W + b.

    The kernel W is shaped [*in_shape, *out_shape]. In a stack of layers it has a leading layer axis, which the scan
    removes before the call. It is a Variable, or a module that stores it in another form (quantised, for example) with
    `contract(x, keys)`, `dequantize()`, `shape`, `size` and `dtype`.
    """

    kernel: Any  # a union of both kinds would make every access to a plain kernel a cast

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

    def __call__(self, x: Array, dropout_keys: Key[Array, " B"] | None = None, out_dtype=None) -> Array:
        """Maps [B, ..., *in_shape] to [B, ..., *out_shape].

        Args:
          x: input of any float dtype; multiplied in the compute dtype with float32 accumulation.
          dropout_keys: one key per example, for dropout and other randomness in training; None is deterministic.
          out_dtype: dtype of the result; None means the compute dtype.
        """
        dtype = jnp.dtype(self.dtype)
        return cast(self.affine(cast(x, dtype), dropout_keys), jnp.dtype(out_dtype or dtype))

    def affine(self, x: Array, dropout_keys: Key[Array, " B"] | None) -> Array:
        """Returns x W + b in float32."""
        return self.add_bias(self.product(x, dropout_keys))

    def product(self, x: Array, keys: Key[Array, " B"] | None) -> Array:
        """Returns x W in float32."""
        if isinstance(self.kernel, nnx.Variable):
            return contract(x, self.kernel[...].astype(x.dtype), len(self.in_shape))
        return self.kernel.contract(x, keys)

    def add_bias(self, y: Array) -> Array:
        """Returns y + b in float32, or y if there is no bias."""
        return y if self.bias is None else y + broadcast(self.bias[...].astype(jnp.float32), y)

    def dense_kernel(self) -> Array:
        """Returns W in float32, dequantised if necessary, with the layer axis if stacked."""
        return (
            self.kernel[...].astype(jnp.float32) if isinstance(self.kernel, nnx.Variable) else self.kernel.dequantize()
        )


def projections(model: nnx.Module) -> dict[str, Projection]:
    """Returns every projection of a model by module path, such as "decoder/layers/self_attn/q_proj"."""
    modules = nnx.iter_modules(model)
    return dict(
        sorted(("/".join(map(str, path)), module) for path, module in modules if isinstance(module, Projection))
    )


def depth(module: Projection) -> int | None:
    """Returns the number of layers of a stacked projection, or None if it is not stacked."""
    stacked = len(module.kernel.shape) > len(module.in_shape) + len(module.out_shape)
    return module.kernel.shape[0] if stacked else None


def contract(x: Array, kernel: Array, num_contracted: int) -> Array:
    """Contracts the last axes of x with the first of kernel, accumulating in float32."""
    lhs = tuple(range(x.ndim - num_contracted, x.ndim))
    rhs = tuple(range(num_contracted))
    return lax.dot_general(x, kernel, ((lhs, rhs), ((), ())), preferred_element_type=jnp.float32)
