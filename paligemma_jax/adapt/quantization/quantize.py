"""Quantised bases: `quantize` replaces a model's kernels by 4- or 8-bit ones, for QLoRA and for serving.

LoRA attaches to a quantised projection as to a plain one, and only adapters train. Loaders quantise one layer at a time
with `quantize_array`; `nnx.eval_shape` of `quantize`, or `quantized_shapes`, gives the shapes.
"""

import re
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Num

from paligemma_jax.adapt.quantization.quantized_kernel import Codec, QuantizedKernel, encode, make_codec
from paligemma_jax.models.projection import projections
from train_jax.core import patterns
from train_jax.core.errors import UserError

TARGETS = r"(vision|decoder)/layers/.*|projector/linear"
"""Pattern of the layers that bitsandbytes quantises in PaliGemma: all linear layers but the vocabulary projection."""

FROZEN = r".*/kernel/(codes|absmax|nested_absmax|offset|minimum|step|channel_absmax)"
"""Pattern of the arrays of quantised kernels, which never train."""

# Like the rules of plain kernels in tasks/common.py: groups split the output axis, a group has whole rows (blocks.py).
_STORED = r"kernel/(codes|absmax|minimum|step)"
SHARDING_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (rf".*/layers/(self_attn/[qkv]_proj|mlp/(gate_proj|up_proj|fc1))/{_STORED}", (None, "tensor", "fsdp")),
    (rf".*/layers/(self_attn/(o|out)_proj|mlp/(down_proj|fc2))/{_STORED}", (None, "fsdp", "tensor")),
    (r".*/layers/(self_attn/[qkv]_proj|mlp/(gate_proj|up_proj|fc1))/kernel/channel_absmax", (None, "tensor")),
    (r".*/layers/(self_attn/(o|out)_proj|mlp/(down_proj|fc2))/kernel/channel_absmax", (None, "fsdp")),
    (rf".*projector/linear/{_STORED}", ("fsdp", None)),
    (r".*projector/linear/kernel/channel_absmax", ("fsdp",)),
)
"""Sharding rules of quantised kernels; they precede the rules of plain kernels."""


def quantize(
    model: nnx.Module, kind: str, block_size: int = 64, double: bool = False, *, targets: str = TARGETS
) -> nnx.Module:
    """Quantises the kernels of the projections whose path the pattern matches in full.

    Args:
      model: changed in place; biases, norms, embeddings and adapters stay as they are.
      kind: "nf4" (4-bit NormalFloat by blocks), "int8" (by output channels) or "int4" (linear by blocks; to compare).
      block_size: 64 or 128 weights per block, in the layout of bitsandbytes; kernels may have any size.
      double: whether to store the block constants of NF4 in 8 bits too.
      targets: regular expression over module paths such as "decoder/layers/mlp/gate_proj".

    Returns:
      The model. Kernels are dequantised on use, to the compute dtype.

    Raises:
      UserError: an unknown kind or block size, a pattern that matches nothing, or a kernel that is quantised already.
    """
    codec = make_codec(kind, block_size, double)
    modules = projections(model)
    matched = patterns.select(targets, modules, what="quantize targets")
    for path in matched:
        if isinstance(modules[path].kernel, QuantizedKernel):
            raise UserError(f"{path} is quantised already: dequantize the model before quantising it again.")
    for path in matched:
        module = modules[path]
        module.kernel = QuantizedKernel.of(module.kernel[...], codec, module.in_shape, module.out_shape)
    return model


def dequantize(model: nnx.Module) -> nnx.Module:
    """Replaces every quantised kernel by a plain one of its original dtype, in place, and returns the model.

    The rounding of quantisation is not undone. A model without quantised kernels is not changed.
    """
    for module in projections(model).values():
        if isinstance(module.kernel, QuantizedKernel):
            module.kernel = nnx.Param(module.kernel.dequantize().astype(module.kernel.dtype))
    return model


def quantized_kernels(model: nnx.Module) -> dict[str, QuantizedKernel]:
    """Returns the quantised kernels by path, such as "decoder/layers/mlp/gate_proj/kernel"."""
    kernels = {f"{path}/kernel": module.kernel for path, module in projections(model).items()}
    return {path: kernel for path, kernel in kernels.items() if isinstance(kernel, QuantizedKernel)}


def is_quantized(model: nnx.Module) -> bool:
    """Returns whether any projection has a quantised kernel."""
    return bool(quantized_kernels(model))


def parameter_counts(model: nnx.Module) -> dict[str, int]:
    """Returns the number of weights that each array of quantised kernels stores, by path; constants store none."""
    return {
        f"{path}/{leaf}": kernel.size if leaf == "codes" else 0
        for path, kernel in quantized_kernels(model).items()
        for leaf in kernel.codec.leaves
    }


def describe(model: nnx.Module) -> str:
    """Returns a line with the number and kind of quantised kernels, their weights, bits per weight and size in MiB."""
    kernels = quantized_kernels(model).values()
    kinds = ", ".join(sorted({kernel.kind for kernel in kernels}))
    weights, size = sum(kernel.size for kernel in kernels), sum(kernel.nbytes for kernel in kernels)
    bits = 8 * size / max(weights, 1)
    return f"{len(kernels)} kernels in {kinds}: {weights:,} weights of {bits:.3g} bits, {size / 2**20:,.2f} MiB"


def refuse_trained(paths: Iterable[str]) -> None:
    """Raises UserError if one of the paths of trained parameters belongs to a quantised kernel."""
    frozen = [path for path in paths if re.fullmatch(FROZEN, path)]
    if frozen:
        raise UserError(
            f"trainable matches {frozen[0]}, which is quantised and cannot train, expected parameters beside the "
            "quantised kernels: change the pattern, train adapters, or leave the base unquantised."
        )


def quantize_array(
    kind: str,
    array: Num[Array, "..."] | Num[np.ndarray, "..."],
    num_contracted: int,
    block_size: int = 64,
    double: bool = False,
) -> dict[str, Array]:
    """Quantises the kernel of one layer, for loaders.

    Args:
      kind, block_size, double: as in `quantize`.
      array: [in..., out...] of any float dtype (torch's weight [out, in] transposed).
      num_contracted: number of input axes.

    Returns:
      The arrays by their names below the kernel's path. Stacked over all layers on a leading axis, they equal the
      result of `quantize` for the stacked kernel.

    Raises:
      UserError: an unknown kind or block size.
    """
    return encode(make_codec(kind, block_size, double), array, num_contracted)


def quantized_shapes(
    kind: str, shape: tuple[int, ...], num_contracted: int, block_size: int = 64, double: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of the result of `quantize_array` for a kernel of `shape` [in..., out...]."""
    codec: Codec = make_codec(kind, block_size, double)
    kernel = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
    return jax.eval_shape(lambda kernel: encode(codec, kernel, num_contracted), kernel)


def set_outlier_split(model: nnx.Module, threshold: int | float | None = 6.0) -> nnx.Module:
    """Sets how int8 kernels multiply, in place: with LLM.int8()'s split, for evaluation, or with dequantised weights.

    Args:
      model: quantised with "int8".
      threshold: inputs of this magnitude or more are multiplied in floating point, the rest int8 x int8 (int8.py). None
        multiplies with dequantised weights, which training needs and which is the default after `quantize`.

    Returns:
      The model.

    Raises:
      UserError: the model has no int8 kernels, or the threshold is not positive.
    """
    kernels = [kernel for kernel in quantized_kernels(model).values() if kernel.kind == "int8"]
    if not kernels:
        raise UserError("the model has no int8 kernels to split outliers from: quantize it with 'int8' first.")
    if threshold is not None and not threshold > 0:
        raise UserError(f"the outlier threshold is {threshold}, expected a positive number or None: LLM.int8 has 6.0.")
    for kernel in kernels:
        kernel.outlier_threshold = threshold
    return model
