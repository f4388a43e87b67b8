"""The linear layer of every tower. Axes: see models."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array

from paligemma_jax.models.dropout import DropoutKeys
from paligemma_jax.models.numerics import broadcast, cast

PROJECTED = "projected"  # name of results for policies of `jax.checkpoint`


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

    def __call__(self, x: Array, dropout_keys: DropoutKeys | None = None, out_dtype=None) -> Array:
        """Maps [B, ..., *in_shape] to [B, ..., *out_shape].

        Args:
          x: input of any float dtype; multiplied in the compute dtype with float32 accumulation.
          dropout_keys: one key per example or token, for dropout and other randomness in training, or None.
          out_dtype: dtype of the result; None means the compute dtype.
        """
        dtype = jnp.dtype(self.dtype)
        out_dtype = jnp.dtype(out_dtype or dtype)
        y = cast(self.affine(cast(x, dtype), dropout_keys, out_dtype), out_dtype)
        return checkpoint_name(y, PROJECTED)

    def flat(self, x: Array, dropout_keys: DropoutKeys | None = None, out_dtype=None) -> Array:
        """Like `__call__`, from [B, ..., I] to [B, ..., O] with the axes of `in_shape` and of `out_shape` flattened.

        The product is one of two matrices, so that the result is laid out as one, without padding of the last axis.
        """
        if not is_plain(self):
            y = self(x.reshape(*x.shape[:-1], *self.in_shape), dropout_keys, out_dtype)
            return y.reshape(*x.shape[:-1], -1)
        dtype = jnp.dtype(self.dtype)
        out_dtype = jnp.dtype(out_dtype or dtype)
        kernel = self.kernel[...].astype(dtype).reshape(x.shape[-1], -1)
        y = contract(cast(x, dtype), kernel, 1, out_dtype if self.bias is None else jnp.float32)
        if self.bias is not None:
            y += broadcast(self.bias[...].astype(jnp.float32).reshape(-1), y)
        return checkpoint_name(cast(y, out_dtype), PROJECTED)

    def affine(self, x: Array, dropout_keys: DropoutKeys | None, out_dtype=jnp.float32) -> Array:
        """Returns x W + b in float32, or x W in `out_dtype` if there is no bias."""
        if self.bias is None:
            return self.product(x, dropout_keys, out_dtype)
        return self.add_bias(self.product(x, dropout_keys))

    def product(self, x: Array, keys: DropoutKeys | None, out_dtype=jnp.float32) -> Array:
        """Returns x W as `out_dtype`, accumulated in float32; a quantized kernel returns float32."""
        if isinstance(self.kernel, nnx.Variable):
            return contract(x, self.kernel[...].astype(x.dtype), len(self.in_shape), out_dtype)
        return self.kernel.contract(x, keys)

    def add_bias(self, y: Array) -> Array:
        """Returns y + b in float32, or y if there is no bias."""
        return y if self.bias is None else y + broadcast(self.bias[...].astype(jnp.float32), y)

    def dense_kernel(self) -> Array:
        """Returns W in float32, dequantised if necessary, with the layer axis if stacked."""
        return (
            self.kernel[...].astype(jnp.float32) if isinstance(self.kernel, nnx.Variable) else self.kernel.dequantize()
        )


def is_plain(projection: Projection) -> bool:
    """Whether a projection is a `Projection` itself, no subclass, whose kernel is one array."""
    return type(projection) is Projection and isinstance(projection.kernel, nnx.Variable)


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


def contract(x: Array, kernel: Array, num_contracted: int, out_dtype=jnp.float32) -> Array:
    """Contracts the last axes of x with the first of kernel, accumulating in float32. Differentiable in reverse mode.

    In half precision the cotangent is rounded to the operands' dtype before the products of the backward pass, as where
    a layer's output has that dtype. A float32 cotangent would make these products float32: half as fast on a GPU with
    TF32, and an eighth on one without.

    Args:
      x: [..., *contracted].
      kernel: [*contracted, ...], of the dtype of x.
      num_contracted: number of contracted axes.
      out_dtype: of the result. A float16 result saturates.
    """
    # XLA does not fuse the conversion of a product into it on GPUs. In float16 the cast saturates, a product does not.
    dtype = jnp.float32 if out_dtype == jnp.float16 else out_dtype
    return cast(_dot((num_contracted, jnp.dtype(dtype)), x, kernel), out_dtype)


def _plain_dot(static: tuple[int, jnp.dtype], x: Array, kernel: Array) -> Array:
    """Contracts as `contract`; `static` is the number of contracted axes and the dtype of the result."""
    num_contracted, dtype = static
    lhs = tuple(range(x.ndim - num_contracted, x.ndim))
    rhs = tuple(range(num_contracted))
    return lax.dot_general(x, kernel, ((lhs, rhs), ((), ())), preferred_element_type=dtype)


_dot = jax.custom_vjp(_plain_dot, nondiff_argnums=(0,))


def _dot_forward(static: tuple[int, jnp.dtype], x, kernel):
    # What only the gradient of a frozen argument would need is not saved.
    residuals = x.value if kernel.perturbed else None, kernel.value if x.perturbed else None
    return _plain_dot(static, x.value, kernel.value), residuals


def _dot_backward(static: tuple[int, jnp.dtype], residuals: tuple[Array | None, Array | None], cotangent: Array):
    num_contracted, (x, kernel) = static[0], residuals
    d_x = d_kernel = None
    # The products accumulate in float32 and are rounded once, to the dtype of x and kernel.
    if kernel is not None:
        outputs = kernel.ndim - num_contracted
        shape = (*cotangent.shape[: cotangent.ndim - outputs], *kernel.shape[:num_contracted])
        like = jax.ShapeDtypeStruct(shape, kernel.dtype)
        pull = jax.linear_transpose(lambda x: _plain_dot((num_contracted, kernel.dtype), x, kernel), like)
        (d_x,) = pull(_rounded(cotangent, kernel.dtype))
    if x is not None:
        d_kernel = _kernel_gradient(x, _rounded(cotangent, x.dtype), num_contracted)
    return d_x, d_kernel


def _rounded(cotangent: Array, dtype: DTypeLike) -> Array:
    """Casts the cotangent. A barrier keeps the cast out of the product, which on TPUs would repeat it for each tile."""
    return cotangent if cotangent.dtype == dtype else lax.optimization_barrier(cotangent.astype(dtype))


_dot.defvjp(_dot_forward, _dot_backward, symbolic_zeros=True)


def _kernel_gradient(x: Array, cotangent: Array, num_contracted: int) -> Array:
    """Returns the gradient of the kernel, in the dtype of `x` and of the product's cotangent.

    The transpose of the forward product contracts the axes of rows and of positions. For such a product XLA on CPUs
    computes the cotangent, with all that is fused into it, in transposed order: several times slower than a product of
    two matrices.
    """
    rows = x.ndim - num_contracted
    shape = (*x.shape[rows:], *cotangent.shape[rows:])

    def transposed(x, cotangent):
        like = jax.ShapeDtypeStruct(shape, x.dtype)
        return jax.linear_transpose(lambda kernel: _plain_dot((num_contracted, x.dtype), x, kernel), like)(cotangent)[0]

    def of_matrices(x, cotangent):
        x, cotangent = (array.reshape(math.prod(array.shape[:rows]), -1) for array in (x, cotangent))
        product = lax.dot_general(x, cotangent, (((0,), (0,)), ((), ())), preferred_element_type=x.dtype)
        return product.reshape(shape)

    return lax.platform_dependent(x, cotangent, cpu=of_matrices, default=transposed)
