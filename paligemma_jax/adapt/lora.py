"""LoRA (Hu et al. 2021): a trainable low-rank update beside each frozen kernel, y = x W + (alpha / r) (x A) B.

The update lives inside the projection layer (models/layers.py), so base parameter names survive: a base checkpoint
loads unchanged, and `attach_lora` and `detach_lora` are inverses. Axes: layers.py.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from paligemma_jax.adapt.quantized_kernel import QuantizedKernel
from paligemma_jax.models.layers import Projection
from train_jax import params, patterns
from train_jax.errors import UserError

TRAINABLE = r".*/lora_[ab]"
"""Pattern of the parameters that LoRA trains."""


def projections(model: nnx.Module) -> dict[str, Projection]:
    """Every projection of a model by module path, such as "decoder/layers/self_attn/q_proj"."""
    found = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model) if type(module) is Projection}
    return dict(sorted(found.items()))


def attach_lora(
    model: nnx.Module,
    targets: str = r"decoder/.*/(q_proj|o_proj)",
    rank: int = 8,
    alpha: int | float = 32.0,
    dropout: int | float = 0.0,
    *,
    rngs: nnx.Rngs,
    rslora: bool = False,
    dtype: str = "float32",
) -> nnx.Module:
    """Adds zero-initialised adapters to the projections whose path the pattern matches in full.

    peft matches by name suffix and so reaches the vision tower's `q_proj` too; here a pattern says which tower:
    `r".*/(q_proj|o_proj)"` is what peft's `["q_proj", "o_proj"]` does.

    Args:
      model: changed in place.
      targets: regular expression over module paths.
      rank: r.
      alpha: the update is scaled by alpha / r, or alpha / sqrt(r) with `rslora` (Kalajdzievski 2023).
      dropout: probability of dropping an entry of the adapter's input, in training only.
      rngs: A is drawn Kaiming-uniform over all contracted axes (bound 1 / sqrt(fan in), as peft), B is zero.
      rslora: see alpha.
      dtype: of A and B.

    Returns:
      The model.

    Raises:
      UserError: the pattern matches nothing, a rank below 1, a dropout outside [0, 1), or adapters are there already.
    """
    modules = projections(model)
    if rank < 1 or not 0.0 <= dropout < 1.0:
        raise UserError(f"lora has rank {rank} and dropout {dropout}, expected rank >= 1 and 0 <= dropout < 1.")
    matched = patterns.select(targets, modules, what="lora targets")
    for path in matched:
        if modules[path].lora_a is not None:
            raise UserError(f"{path} has a LoRA adapter already: merge or detach it before attaching another.")
    for path in matched:
        module = modules[path]
        stack = module.kernel.shape[: -len(module.in_shape) - len(module.out_shape)]
        bound = 1.0 / math.sqrt(math.prod(module.in_shape))
        shape = (*stack, *module.in_shape, rank)
        a = jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
        module.lora_a = nnx.Param(a.astype(dtype))
        module.lora_b = nnx.Param(jnp.zeros((*stack, rank, *module.out_shape), dtype))
        module.lora_scale = alpha / (math.sqrt(rank) if rslora else rank)
        module.lora_dropout = dropout
    return model


def detach_lora(model: nnx.Module) -> nnx.Module:
    """Removes all adapters in place and returns the base model."""
    for module in projections(model).values():
        module.lora_a = nnx.data(None)
        module.lora_b = nnx.data(None)
        module.lora_scale, module.lora_dropout = 1.0, 0.0
    return model


def merge_lora(model: nnx.Module, *, requantize: bool = False) -> nnx.Module:
    """Folds every adapter into its kernel (in float32, cast once at the end), in place, and removes the adapters.

    Args:
      model: with adapters. A quantised kernel that has one is dequantised to the very weights it was used with, and
        comes out plain, in the dtype it had before it was quantised; `quantize.dequantize` does so with the others.
      requantize: store such a kernel as it was stored before; this rounds away part of what was trained, and
        `largest_logit_gap` tells how much that changes.

    Raises:
      UserError: the model has no adapters.
    """
    adapted = {path: module for path, module in projections(model).items() if module.lora_a is not None}
    if not adapted:
        raise UserError("the model has no LoRA adapters to merge: load one or attach one first.")
    for module in adapted.values():
        kernel = module.kernel
        if isinstance(kernel, QuantizedKernel):
            merged = kernel.dequantize() + lora_delta(module)
            module.kernel = kernel.requantized(merged) if requantize else nnx.Param(merged.astype(kernel.dtype))
        else:
            kernel[...] = (kernel[...].astype(jnp.float32) + lora_delta(module)).astype(kernel.dtype)
    return detach_lora(model)


def largest_logit_gap(model: nnx.Module, other: nnx.Module, **inputs: Array) -> float:
    """Largest absolute difference of two models' logits at real text positions, before and after a merge, say.

    Args:
      model, other: of the same family; merging works in place, so keep `nnx.clone(model)` to compare with.
      inputs: of the model's call (images, tokens, mask_ar, mask_input).
    """

    @jax.jit
    def gap(first, second, inputs):
        logits = [
            params.merge(graph, arrays)(**inputs)[0] for graph, arrays in zip(graphs, (first, second), strict=True)
        ]
        mask = jnp.asarray(inputs.get("mask_input", jnp.ones(logits[0].shape[:2])), bool)
        return jnp.where(mask[..., None], jnp.abs(logits[0] - logits[1]), 0.0).max()

    graphs, arrays = zip(*(params.split(each) for each in (model, other)), strict=True)
    return float(gap(*arrays, inputs))


def lora_delta(module: Projection) -> Array:
    """s A B of a projection in float32, shaped as its kernel (with the layer axis, if stacked)."""
    a, b = module.lora_a[...].astype(jnp.float32), module.lora_b[...].astype(jnp.float32)
    inputs, outputs = math.prod(module.in_shape), math.prod(module.out_shape)
    stack, rank = module.kernel.shape[: -len(module.in_shape) - len(module.out_shape)], a.shape[-1]
    product = jnp.matmul(
        a.reshape(*stack, inputs, rank), b.reshape(*stack, rank, outputs), precision=jax.lax.Precision.HIGHEST
    )
    return (module.lora_scale * product).reshape(module.kernel.shape)


@dataclasses.dataclass(frozen=True)
class LoraRow:
    """One adapted module (all its layers together): parameters of the base and of the adapter."""

    path: str
    layers: int
    d_in: int
    d_out: int
    base: int
    lora: int  # layers * r * (d_in + d_out)


def lora_table(model: nnx.Module) -> list[LoraRow]:
    """What the pattern matched, module by module."""
    rows = []
    for path, module in projections(model).items():
        if module.lora_a is not None:
            d_in, d_out = math.prod(module.in_shape), math.prod(module.out_shape)
            layers = module.kernel.size // (d_in * d_out)
            rows.append(LoraRow(path, layers, d_in, d_out, module.kernel.size, module.lora_a.size + module.lora_b.size))
    return rows


def format_lora_table(rows: list[LoraRow]) -> str:
    """The table as text, with totals; for W of d_in x d_out the adapter has r (d_in + d_out) parameters."""
    lines = [f"{'LoRA on':<36} {'layers':>6} {'d_in':>6} {'d_out':>6} {'base':>14} {'LoRA':>11} {'share':>7}"]
    total = LoraRow("total", 0, 0, 0, sum(r.base for r in rows), sum(r.lora for r in rows))
    for row in [*rows, total]:
        sizes = f"{row.layers:>6} {row.d_in:>6} {row.d_out:>6}" if row.layers else f"{'':>20}"
        lines.append(f"{row.path:<36} {sizes} {row.base:>14,} {row.lora:>11,} {row.lora / row.base:>7.2%}")
    return "\n".join(lines)
