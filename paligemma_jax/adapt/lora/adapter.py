"""LoRA (Hu et al. 2021): a trainable low-rank update of each frozen kernel, y = x W + (alpha / r) (x A) B.

A target becomes a LoraProjection (layer.py) in place and keeps its parameter names, so a base checkpoint loads
unchanged, and `detach_lora` is the inverse of `attach_lora`. Ranks and scales may differ from layer to layer
(spec.py); DoRA (Liu et al. 2024) adds a trainable magnitude for every output channel. Axes: see models.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from paligemma_jax.adapt import attachment
from paligemma_jax.adapt.lora import low_rank
from paligemma_jax.adapt.lora.layer import LoraProjection
from paligemma_jax.adapt.lora.spec import LoraSpec, make_specs
from paligemma_jax.adapt.quantization.quantized_kernel import Frozen, QuantizedKernel
from paligemma_jax.models.projection import Projection, depth, projections
from train_jax.core import param_tree, patterns
from train_jax.core.errors import UserError

TRAINABLE = r".*/lora_(a|b|magnitude)"
"""Pattern of the parameters that LoRA trains."""


def attach_lora(
    model: nnx.Module,
    targets: str = r"decoder/.*/(q_proj|o_proj)",
    rank: int = 8,
    alpha: int | float = 32.0,
    dropout: int | float = 0.0,
    *,
    rngs: nnx.Rngs,
    rslora: bool = False,
    dora: bool = False,
    layers: Sequence[int] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, int | float] | None = None,
    dtype: str = "float32",
) -> nnx.Module:
    """Adds adapters to the projections whose path the pattern matches in full; the model's output does not change yet.

    peft matches by name suffix, which includes the vision tower's `q_proj`; here the pattern names the tower:
    `r".*/(q_proj|o_proj)"` corresponds to peft's `["q_proj", "o_proj"]`.

    Args:
      model: changed in place.
      targets: regular expression over module paths.
      rank: r.
      alpha: the update is scaled by alpha / r, or by alpha / sqrt(r) with `rslora` (Kalajdzievski 2023).
      dropout: probability of dropping an entry of the adapter's input, in training only.
      rngs: random keys of A, which is Kaiming-uniform over all contracted axes (bound 1 / sqrt(fan in), as in peft); B
        is zero.
      rslora: see alpha.
      dora: whether to train the magnitude of every output channel separately from its direction (Liu et al. 2024).
      layers: numbers of the layers to adapt in every stack that the targets match; None means all.
      rank_pattern, alpha_pattern: different ranks and alphas by regular expressions over paths with the layer's number,
        such as {r"decoder/layers/(0|1)/.*": 4}; the first that matches is used.
      dtype: dtype of A and B; magnitudes are float32.

    Returns:
      The model.

    Raises:
      UserError: a pattern that matches nothing, layers that do not exist, a rank below 1, a dropout outside [0, 1), or
        a projection that has an adapter already.
    """
    modules = projections(model)
    if rank < 1 or not 0.0 <= dropout < 1.0:
        raise UserError(f"lora has rank {rank} and dropout {dropout}, expected rank >= 1 and 0 <= dropout < 1.")
    depths = {path: depth(modules[path]) for path in patterns.select(targets, modules, what="lora targets")}
    specs = make_specs(
        depths, rank, alpha, rslora=rslora, layers=layers, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern
    )
    check_free(modules, specs)
    for path, spec in specs.items():
        a, b = _initial_factors(modules[path], spec, rngs)
        magnitude = _initial_magnitude(modules[path], spec) if dora else None
        install(modules[path], spec, a.astype(dtype), b.astype(dtype), magnitude, dropout)
    return model


def _initial_factors(module: Projection, spec: LoraSpec, rngs: nnx.Rngs) -> tuple[Array, Array]:
    """Returns A, Kaiming-uniform up to each layer's rank and zero beyond it, and B, zero."""
    stack = () if depth(module) is None else (len(spec.ranks),)
    bound = 1.0 / math.sqrt(math.prod(module.in_shape))
    a = jax.random.uniform(rngs.params(), (*stack, *module.in_shape, spec.rank), jnp.float32, -bound, bound)
    if min(spec.ranks) < spec.rank:
        used = jnp.arange(spec.rank)[None] < jnp.array(spec.ranks)[:, None]
        a = jnp.where(jax.lax.expand_dims(used, range(1, 1 + len(module.in_shape))), a, 0.0)
    return a, jnp.zeros((*stack, spec.rank, *module.out_shape))


def _initial_magnitude(module: Projection, spec: LoraSpec) -> Array:
    """Returns the norms of the base's kernel, with which DoRA is the identity; zero in layers without an adapter."""

    def norms_of(kernel: Array) -> Array:
        return low_rank.column_norms(kernel, len(module.in_shape), len(module.out_shape))

    if depth(module) is None:
        return norms_of(module.dense_kernel())
    if isinstance(module.kernel, QuantizedKernel):  # dequantise one layer at a time
        norms = jnp.stack([norms_of(kernel) for kernel in module.kernel.dequantized_layers()])
    else:
        norms = norms_of(module.kernel[...])
    has_adapter = jnp.array(spec.ranks) > 0
    return jnp.where(jax.lax.expand_dims(has_adapter, range(1, norms.ndim)), norms, 0.0)


def lora_projections(model: nnx.Module) -> dict[str, LoraProjection]:
    """Returns the projections that have an adapter, by module path."""
    return {path: module for path, module in projections(model).items() if isinstance(module, LoraProjection)}


def check_free(modules: Mapping[str, Projection], paths: Iterable[str]) -> None:
    """Raises UserError if one of these projections has an adapter."""
    for path in paths:
        if isinstance(modules[path], LoraProjection):
            raise UserError(f"{path} has a LoRA adapter already: merge or detach it before attaching another.")


def install(
    module: Projection, spec: LoraSpec, a: Array, b: Array, magnitude: Array | None, dropout: int | float
) -> None:
    """Attaches an adapter to a projection.

    Args:
      module: a projection without an adapter, changed in place.
      spec: ranks and scales.
      a, b: [*in_shape, r] and [r, *out_shape], with a leading layer axis if stacked; zero beyond a layer's rank.
      magnitude: DoRA's [*out_shape], with a leading layer axis if stacked, or None.
      dropout: dropout probability of the adapter's input.
    """
    scales = set(spec.scales)
    attachment.attach(
        module,
        LoraProjection,
        lora_a=nnx.Param(a),
        lora_b=nnx.Param(b),
        lora_magnitude=nnx.data(None) if magnitude is None else nnx.Param(magnitude),
        lora_layer_scale=nnx.data(None) if len(scales) == 1 else Frozen(jnp.array(spec.scales, jnp.float32)),
        lora_scale=spec.scales[0] if len(scales) == 1 else 1.0,
        lora_dropout=dropout,
        lora_spec=spec,
    )


def detach_lora(model: nnx.Module) -> nnx.Module:
    """Removes all LoRA adapters in place, which leaves the base, and returns the model."""
    for module in lora_projections(model).values():
        attachment.detach(module, LoraProjection)
    return model


def merge_lora(model: nnx.Module, *, requantize: bool = False) -> nnx.Module:
    """Adds every adapter to its kernel (in float32, cast once at the end), in place, and removes the adapters.

    Args:
      model: with adapters. A quantised kernel with an adapter is dequantised to the weights it was trained with and
        becomes a plain kernel of its dtype before quantisation; `quantize.dequantize` does so with the other kernels.
      requantize: whether to quantise merged kernels again. This rounds away part of the adapter; `largest_logit_gap`
        measures the difference.

    Returns:
      The model.

    Raises:
      UserError: the model has no adapters.
    """
    modules = lora_projections(model)
    if not modules:
        raise UserError("the model has no LoRA adapters to merge: load one or attach one first.")
    for module in modules.values():
        kernel = module.kernel
        if isinstance(kernel, QuantizedKernel):
            merged = module.merged_kernel()
            module.kernel = kernel.requantized(merged) if requantize else nnx.Param(merged.astype(kernel.dtype))
        else:
            kernel[...] = module.merged_kernel().astype(kernel.dtype)
    return detach_lora(model)


def largest_logit_gap(model: nnx.Module, other: nnx.Module, **inputs: Array) -> float:
    """Returns the largest absolute difference of two models' logits at real text positions.

    Args:
      model, other: models of the same class. A merge works in place: keep `nnx.clone(model)` to compare with.
      inputs: arguments of the model's call (images, tokens, mask_ar, mask_input).
    """

    @jax.jit
    def gap(first, second, inputs):
        models = [param_tree.merge(graph, arrays) for graph, arrays in zip(graphs, (first, second), strict=True)]
        logits = [cast(Callable, model)(**inputs)[0] for model in models]
        mask = jnp.asarray(inputs.get("mask_input", jnp.ones(logits[0].shape[:2])), bool)
        return jnp.where(mask[..., None], jnp.abs(logits[0] - logits[1]), 0.0).max()

    graphs, arrays = zip(*(param_tree.split(each) for each in (model, other)), strict=True)
    return float(gap(*arrays, inputs))


@dataclasses.dataclass(frozen=True)
class LoraRow:
    """Parameter counts of one adapted module (all its layers together)."""

    path: str
    layers: int  # number of adapted layers
    d_in: int
    d_out: int
    base: int
    lora: int  # sum of r (d_in + d_out) over the adapted layers, plus d_out for each with DoRA


def lora_table(model: nnx.Module) -> list[LoraRow]:
    """Returns the adapted modules with their parameter counts; zeros that pad lower ranks are not counted."""
    rows = []
    for path, module in lora_projections(model).items():
        d_in, d_out = math.prod(module.in_shape), math.prod(module.out_shape)
        ranks = [rank for rank in module.lora_spec.ranks if rank]
        lora = sum(ranks) * (d_in + d_out) + (module.lora_magnitude is not None) * len(ranks) * d_out
        rows.append(LoraRow(path, len(ranks), d_in, d_out, module.kernel.size, lora))
    return rows


def format_lora_table(rows: list[LoraRow]) -> str:
    """Formats the table as text, with totals; for W of d_in x d_out the adapter has r (d_in + d_out) parameters."""
    lines = [f"{'LoRA on':<36} {'layers':>6} {'d_in':>6} {'d_out':>6} {'base':>14} {'LoRA':>11} {'share':>7}"]
    total = LoraRow("total", 0, 0, 0, sum(r.base for r in rows), sum(r.lora for r in rows))
    for row in [*rows, total]:
        sizes = f"{row.layers:>6} {row.d_in:>6} {row.d_out:>6}" if row.layers else f"{'':>20}"
        lines.append(f"{row.path:<36} {sizes} {row.base:>14,} {row.lora:>11,} {row.lora / row.base:>7.2%}")
    return "\n".join(lines)
