"""Kernels of a decoder that multiply in place, without copying a layer's matrix out of its stack.

A scan over layers hands every layer slices of the stacked parameters. XLA fuses such a slice into its own products, but
copies it for a Pallas kernel. `read_in_place` replaces the kernels of a decoder, for generation, by modules that keep
the whole stack and the layer's number. On TPUs these multiply few rows with Pallas kernels (few_rows.py, nf4_tpu.py);
many rows, and all rows on other devices, are multiplied as in training.

Axes: L layers, I inputs, O outputs.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from paligemma_jax.adapt.quantization import nf4_tpu
from paligemma_jax.adapt.quantization.int8 import LARGEST, Int8PerChannel
from paligemma_jax.adapt.quantization.nf4 import NF4
from paligemma_jax.adapt.quantization.quantized_kernel import QuantizedKernel
from paligemma_jax.generation import few_rows
from paligemma_jax.models.gemma import Gemma
from paligemma_jax.models.numerics import cast, soft_cap
from paligemma_jax.models.projection import contract, projections
from paligemma_jax.models.stack import Shared
from train_jax.core import devices


class StackedKernel(nnx.Module):
    """The kernel of a projection in a stack of layers; `layer` is its number within a scan, and [L] outside of it."""

    def __init__(self, stack: Array, in_shape: tuple[int, ...], out_shape: tuple[int, ...]):
        self.in_shape, self.out_shape = in_shape, out_shape
        self.stack, self.layer = Shared(stack), nnx.Variable(jnp.arange(len(stack)))

    def dequantize(self) -> Float[Array, "..."]:
        """Returns one layer's kernel in float32."""
        return self._matrix().astype(jnp.float32)

    def contract(self, x: Float[Array, "..."], keys=None) -> Float[Array, "..."]:
        """Contracts the last axes of x [B, ..., *in_shape] with one layer's kernel, accumulating in float32."""
        del keys
        return _by_rows(x, self.in_shape, self.out_shape, self._few, self._many)

    def _many(self, x: Array) -> Array:
        return contract(x, self._matrix().astype(x.dtype), len(self.in_shape))

    def _few(self, x: Float[Array, "N I"]) -> Float[Array, "N O"]:
        inputs, outputs = math.prod(self.in_shape), math.prod(self.out_shape)
        if len(self.out_shape) > 1 or not few_rows.supports(inputs, outputs):
            # As a matrix, a kernel with several output axes lies differently in the memory of a TPU.
            return self._many(x.reshape(-1, *self.in_shape)).reshape(-1, outputs)
        stack = self.stack[...].reshape(-1, inputs, outputs)
        return few_rows.product(x, stack, self.layer[...])

    def _matrix(self) -> Array:
        return _layer(self.stack[...], self.layer[...])


class StackedQuantizedKernel(nnx.Module):
    """A stacked NF4 or int8 kernel, read in place.

    Attributes:
      codec: of `arrays`; NF4 without double quantisation.
      codes, constants: the arrays of all layers.
      by_block: NF4's constants as [L, M, O], or None.
    """

    def __init__(self, kernel: QuantizedKernel):
        self.in_shape, self.out_shape, self.dtype = kernel.in_shape, kernel.out_shape, kernel.dtype
        self.codec, arrays, by_block = kernel.codec, kernel.arrays, None
        if isinstance(self.codec, NF4):
            constants = jax.vmap(self.codec.constants)(arrays)
            self.codec, by_block = NF4(self.codec.block_size), Shared(constants.swapaxes(1, 2))
        else:
            constants = arrays["channel_absmax"]
        self.codes, self.constants, self.by_block = Shared(arrays["codes"]), Shared(constants), nnx.data(by_block)
        self.layer = nnx.Variable(jnp.arange(len(constants)))

    def dequantize(self) -> Float[Array, "..."]:
        """Returns one layer's kernel in float32."""
        return self._one_layer().dequantize()

    def contract(self, x: Float[Array, "..."], keys=None) -> Float[Array, "..."]:
        """Contracts the last axes of x [B, ..., *in_shape] with one layer's kernel, accumulating in float32."""
        del keys
        return _by_rows(x, self.in_shape, self.out_shape, self._few, lambda x: self._one_layer().contract(x))

    def _few(self, x: Float[Array, "N I"]) -> Float[Array, "N O"]:
        layer, codes = self.layer[...], self.codes[...]
        if self.by_block is not None:
            return nf4_tpu.product(x, codes, self.by_block[...], layer)
        scale = _layer(self.constants[...], layer) / LARGEST
        return few_rows.product(x, codes, layer, transposed=True) * scale[None]

    def _one_layer(self) -> QuantizedKernel:
        arrays = (_layer(stack[...], self.layer[...]) for stack in (self.codes, self.constants))
        named = dict(zip(self.codec.leaves, arrays, strict=True))
        return QuantizedKernel(self.codec, self.in_shape, self.out_shape, self.dtype, named)


def read_in_place(decoder: Gemma) -> Gemma:
    """Replaces the kernels of a decoder's layers, in place, for generation in bfloat16 on one TPU."""
    if not _applies(decoder):
        return decoder
    for projection in projections(decoder).values():
        kernel = projection.kernel
        if isinstance(kernel, QuantizedKernel):
            if _supports(kernel):
                projection.kernel = StackedQuantizedKernel(kernel)
        elif isinstance(kernel, nnx.Variable) and kernel.dtype == jnp.bfloat16:
            projection.kernel = StackedKernel(kernel[...], projection.in_shape, projection.out_shape)
    return decoder


def logits(decoder: Gemma, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Returns `decoder.logits(hidden)`, for few rows on a TPU by a Pallas kernel that reads the embedding in place."""
    table = decoder.embed_tokens.embedding[...]
    vocabulary, width = table.shape
    if not _applies(decoder) or table.dtype != jnp.bfloat16 or width % few_rows.LANES:
        return decoder.logits(hidden)

    def few(x: Float[Array, "N D"]) -> Float[Array, "N V"]:
        product = few_rows.product(x, table[None], jnp.zeros((), jnp.int32), transposed=True)
        return soft_cap(product, decoder.config.final_softcap)

    return _by_rows(cast(hidden, table.dtype), (width,), (vocabulary,), few, decoder.logits)


def _applies(decoder: Gemma) -> bool:
    """Whether the program is traced for one TPU, and the decoder computes in bfloat16."""
    on_one_tpu = devices.is_one_device() and devices.device_kind().startswith("TPU")
    return on_one_tpu and decoder.config.dtype == "bfloat16"


def _by_rows(
    x: Float[Array, "..."], in_shape: tuple[int, ...], out_shape: tuple[int, ...], few: Callable, many: Callable
) -> Float[Array, "..."]:
    """Returns `few` of the rows of x [..., *in_shape] as a matrix, if they are few, otherwise `many` of x."""
    lead = x.shape[: x.ndim - len(in_shape)]
    rows = math.prod(lead)
    if rows > few_rows.MOST_ROWS:
        return many(x)
    return few(few_rows.padded(x.reshape(rows, -1)))[:rows].reshape(*lead, *out_shape)


def _supports(kernel: QuantizedKernel) -> bool:
    """Returns whether a kernel has few-row products for its codec and shape."""
    if kernel.outlier_threshold is not None:
        return False
    outputs, inputs = kernel.matrix_shape
    if isinstance(kernel.codec, NF4):
        return nf4_tpu.supports_product(kernel.codes.shape, outputs, kernel.codec.block_size)
    return isinstance(kernel.codec, Int8PerChannel) and few_rows.supports(inputs, outputs)


def _layer(stack: Array, layer: Int[Array, ""]) -> Array:
    return lax.dynamic_index_in_dim(stack, layer, keepdims=False)
