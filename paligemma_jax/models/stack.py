"""Blocks stacked on a leading layer axis and scanned, with rematerialization."""

from collections.abc import Callable

import jax
from flax import nnx
from jax import lax

from train_jax.core import row_sharding

REMAT_POLICIES = {
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


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
