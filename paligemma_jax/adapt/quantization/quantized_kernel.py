"""The module that replaces a projection's kernel with one of 4 or 8 bits, and its product.

The quantised matrix is torch's weight [out, in], with the output axes and the input axes of a projection flattened in C
order. Every layer is quantised separately; stacked layers have a leading axis. The kernel is frozen: it gets no
gradient.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from paligemma_jax.adapt.quantization import blocks, int8, nf4_tpu
from paligemma_jax.adapt.quantization.int4 import Int4
from paligemma_jax.adapt.quantization.int8 import Int8PerChannel
from paligemma_jax.adapt.quantization.nf4 import NF4
from paligemma_jax.models.dropout import DropoutKeys
from paligemma_jax.models.numerics import broadcast
from train_jax.core import devices
from train_jax.core.errors import UserError

Codec = NF4 | Int4 | Int8PerChannel
QUANTIZATION_KINDS = ("nf4", "int8", "int4")
Arrays = TypeVar("Arrays", Array, dict[str, Array])


def make_codec(kind: str, block_size: int = 64, double: bool = False) -> Codec:
    """Returns the codec of a kind, which encodes and decodes a matrix.

    Args:
      kind: "nf4", "int8" (per output channel; the block size is ignored) or "int4".
      block_size: 64 or 128.
      double: whether to store the block constants of NF4 in 8 bits too.

    Raises:
      UserError: an unknown kind or block size, or double quantisation of another kind than NF4.
    """
    if kind not in QUANTIZATION_KINDS:
        raise UserError(f"quantize is {kind!r}, expected one of {', '.join(QUANTIZATION_KINDS)}: choose one of these.")
    if double and kind != "nf4":
        raise UserError(f"double quantisation is set for {kind}, expected nf4: leave double at False.")
    if kind == "nf4":
        return NF4(block_size, double)
    return Int4(block_size) if kind == "int4" else Int8PerChannel()


class Frozen(nnx.Variable):
    """An array of the model that does not train."""


class QuantizedKernel(nnx.Module):
    """Replaces a projection's kernel [*in_shape, *out_shape] (models/projection.py).

    Its arrays (`codes`, `absmax`, ...) are below the kernel's path: "decoder/layers/mlp/gate_proj/kernel/codes".
    """

    codes: Frozen  # all codecs have it; the other arrays depend on the codec
    outlier_threshold: int | float | None

    def __init__(
        self,
        codec: Codec,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        dtype: jnp.dtype,
        arrays: Mapping[str, Array],
    ):
        """Stores arrays made by `encode`; a merge returns to a plain kernel of `dtype`."""
        self.codec = codec
        self.in_shape, self.out_shape = tuple(in_shape), tuple(out_shape)
        self.dtype = np.dtype(dtype)
        self.outlier_threshold = None
        for name in codec.leaves:
            setattr(self, name, Frozen(arrays[name]))

    @classmethod
    def of(
        cls, kernel: Float[Array, "..."], codec: Codec, in_shape: tuple[int, ...], out_shape: tuple[int, ...]
    ) -> "QuantizedKernel":
        """Quantises a kernel [*in_shape, *out_shape], or a stack of them, one layer at a time."""
        if kernel.ndim == len(in_shape) + len(out_shape):
            arrays = encode(codec, kernel, len(in_shape))
        else:
            layers = (_layer(kernel, i) for i in range(kernel.shape[0]))
            encoded = [encode(codec, layer, len(in_shape)) for layer in layers]
            arrays = jax.tree.map(lambda *each: jnp.stack(each), *encoded)
        return cls(codec, in_shape, out_shape, kernel.dtype, arrays)

    @property
    def arrays(self) -> dict[str, Array]:
        """The stored arrays by name."""
        return {name: getattr(self, name)[...] for name in self.codec.leaves}

    @property
    def kind(self) -> str:
        """One of QUANTIZATION_KINDS."""
        return {NF4: "nf4", Int8PerChannel: "int8", Int4: "int4"}[type(self.codec)]

    @property
    def nbytes(self) -> int:
        """Size of the arrays in bytes."""
        leaves = (getattr(self, name) for name in self.codec.leaves)  # shapes, if the model is abstract
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Numbers of outputs and of inputs."""
        return math.prod(self.out_shape), math.prod(self.in_shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the plain kernel, with the layer axis if stacked."""
        return (*self.codes.shape[:-2], *self.in_shape, *self.out_shape)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    def dequantize(self) -> Float[Array, "..."]:
        """Returns the plain kernel in float32, with the layer axis if stacked."""
        if self.codes.ndim == 2:
            return _decode_transposed(self.codec, self.matrix_shape, self.arrays).reshape(self.shape)
        return jnp.stack(list(self.dequantized_layers()))

    def dequantized_layers(self) -> Iterator[Float[Array, "..."]]:
        """Yields the plain kernels of a stack in float32 one by one, so that they are not all in memory."""
        for i in range(self.codes.shape[0]):
            kernel = _decode_transposed(self.codec, self.matrix_shape, _layer(self.arrays, i))
            yield kernel.reshape(*self.in_shape, *self.out_shape)

    def requantized(self, kernel: Float[Array, "..."]) -> "QuantizedKernel":
        """Quantises another kernel of the same shape with the same codec and settings."""
        new = QuantizedKernel.of(kernel, self.codec, self.in_shape, self.out_shape)
        new.dtype, new.outlier_threshold = self.dtype, self.outlier_threshold
        return new

    def contract(self, x: Float[Array, "..."], keys: DropoutKeys | None = None) -> Float[Array, "..."]:
        """Contracts the last axes of x [B, ..., *in_shape] with one layer's kernel, accumulating in float32.

        The kernel is dequantised to the dtype of x in the forward and again in the backward pass; nothing of its full
        size is kept in between. `keys` are not used; kernels of diff pruning need them.
        """
        del keys
        lead = x.shape[: x.ndim - len(self.in_shape)]
        x = x.reshape(*lead, -1)
        if self.outlier_threshold is None:
            # A cast, as the partial of jax.custom_vjp loses the type.
            y = cast(Array, _frozen_product(self.codec, self.matrix_shape, x.dtype, self.arrays, x))
        else:
            y = int8.split_product(self.arrays, x, self.outlier_threshold)
        return y.reshape(*lead, *self.out_shape)


def encode(
    codec: Codec, kernel: Float[Array, "..."] | Float[np.ndarray, "..."], num_contracted: int
) -> dict[str, Array]:
    """Encodes one layer's kernel [in..., out...], whose first `num_contracted` axes are inputs."""
    inputs = math.prod(kernel.shape[:num_contracted])
    # Not jitted as one program: XLA would fuse the strided reads and take five times as long.
    return codec.encode(jnp.asarray(kernel.reshape(inputs, -1).T).astype(jnp.float32))


def _decode_transposed(codec: Codec, shape: tuple[int, int], arrays: dict[str, Array]) -> Float[Array, "I O"]:
    """Decodes one layer's matrix and transposes it to [in, out], outside the jitted program as in `encode`."""
    return _decode(codec, shape, arrays).T


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(codec: Codec, shape: tuple[int, int], arrays: dict[str, Array]) -> Float[Array, "O I"]:
    return codec.decode(arrays, shape)


def _layer(stack: Arrays, index: int) -> Arrays:
    """Returns one layer of stacked arrays; iterating over an array would slice all layers at once."""
    return jax.tree.map(lambda array: array[index], stack)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _frozen_product(
    codec: Codec, shape: tuple[int, int], dtype: jnp.dtype, arrays: dict[str, Array], x: Float[Array, "*B I"]
) -> Float[Array, "*B O"]:
    """Returns x W^T for the matrix W of `shape` that `arrays` encode, in `dtype` with float32 accumulation.

    Differentiable in x alone. Autodiff would keep the dequantised W of every layer for the backward pass; here the
    backward pass dequantises it again.
    """
    return _times_transposed(codec, shape, dtype, arrays)(x)


def _times_transposed(codec: Codec, shape: tuple[int, int], dtype: jnp.dtype, arrays: dict[str, Array]):
    if isinstance(codec, Int8PerChannel):
        # Codes are exact in every float dtype; scaled after the product, they are converted as it reads them.
        matrix, scale = arrays["codes"].reshape(shape).astype(dtype), arrays["channel_absmax"] / int8.LARGEST
    else:
        matrix, scale = _decoded(codec, shape, dtype, arrays), None

    def product(x):
        y = lax.dot_general(x, matrix, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        return y if scale is None else y * broadcast(scale, y)

    return product


def _decoded(codec: Codec, shape: tuple[int, int], dtype: jnp.dtype, arrays: dict[str, Array]) -> Float[Array, "O I"]:
    """Returns one layer's matrix in `dtype`; on TPUs a Pallas kernel decodes NF4 to bfloat16, to the same numbers."""
    if isinstance(codec, NF4) and dtype == jnp.bfloat16 and devices.device_kind().startswith("TPU"):
        kernel = devices.on_whole_arrays(functools.partial(nf4_tpu.dequantize, block_size=codec.block_size))
        if kernel is not None:
            groups = kernel(arrays["codes"], codec.constants(arrays))
            return blocks.join(groups[:, : math.prod(shape) // len(groups)], shape)
    return codec.decode(arrays, shape).astype(dtype)


def _forward(codec, shape, dtype, arrays, x):
    return _frozen_product(codec, shape, dtype, arrays, x), arrays


def _backward(codec, shape, dtype, arrays, dy):
    x = jax.ShapeDtypeStruct((*dy.shape[:-1], shape[1]), dtype)
    (dx,) = jax.linear_transpose(_times_transposed(codec, shape, dtype, arrays), x)(dy)
    return None, dx


_frozen_product.defvjp(_forward, _backward)
