"""Blocks stacked on a leading layer axis and scanned, with rematerialization."""

from collections.abc import Callable
from typing import TypeVar

import jax
from flax import nnx
from jax import lax

from paligemma_jax.models.norms import STATISTICS
from paligemma_jax.models.projection import PROJECTED
from train_jax.core import row_sharding

MLP = "mlp"
"""The `checkpoint_name` of the arguments of an MLP's activation, which take most of the work and memory of a block."""

REMAT_POLICIES = {
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(PROJECTED, STATISTICS),
    "mlp": jax.checkpoint_policies.save_only_these_names(MLP),
    "auto": jax.checkpoint_policies.nothing_saveable,
}


Block = TypeVar("Block", bound=nnx.Module)


class Shared(nnx.Variable):
    """An array that `scan_stack` passes whole to every layer."""


def make_stack(make: Callable[[nnx.Rngs], Block], depth: int, rngs: nnx.Rngs) -> Block:
    """Makes `depth` blocks as one module whose parameters have a leading layer axis."""

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
    row_axes: int | tuple[int, ...] = 0,
):
    """Runs `call(block, carry, x) -> (carry, y)` over the stacked blocks, rematerializing one block at a time.

    The scan compiles one block, whatever the depth, and keeps the weights and activations of one layer alive at a time.

    Args:
      blocks: a module made by `make_stack`; every layer gets a slice of its Variables, except `Shared` ones.
      call: pure function of one layer's module, the carry and that layer's slice of `per_layer`.
      carry: pytree passed from layer to layer.
      per_layer: pytree whose leaves have a leading layer axis, or None.
      remat: "none" keeps activations for the backward pass, "block" recomputes each block from its input,
        "dots" keeps the results of projections, in their dtype, and the statistics of norms, and computes what follows
        from them again: norms, activations, attention; "mlp" keeps what is named MLP.
        The trainer replaces "auto" by one of these (train_jax/step/remat.py); elsewhere it is "block".
      unroll: whether to unroll the loop over layers: faster on CPU, slower to compile. Ignored where weights are
        gathered from other devices.
      row_axes: the batch axis of the carry's arrays, see row_sharding.pin_rows.

    Returns:
      The final carry and the stacked y.

    Raises:
      ValueError: an unknown value of remat.
    """
    graph, shared, params = nnx.split(blocks, Shared, ...)

    def body(carry, inputs):
        layer, x = inputs
        block = nnx.merge(graph, shared, row_sharding.gather(layer))
        carry, y = call(block, row_sharding.pin_rows(carry, row_axes), x)
        return row_sharding.pin_rows(carry, row_axes), y

    if remat == "none":
        body = row_sharding.recompute_gathered(body, params, stacked=True)
    else:
        if remat not in REMAT_POLICIES:
            raise ValueError(f"remat is {remat!r}, expected one of none, {', '.join(REMAT_POLICIES)}.")
        policy = row_sharding.without_weights(REMAT_POLICIES[remat], params, stacked=True)
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    # In an unrolled loop the compiler would gather the weights of all layers at once.
    unroll = unroll and not row_sharding.gathers()
    return lax.scan(body, carry, (params, per_layer), unroll=unroll)
