"""Gradient caching (Gao et al., 2021, arXiv:2101.06983), for batches whose activations do not fit in memory."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from train_jax.core.errors import UserError

_TRACE_CONTEXT = jax.make_user_context(None)  # part of jax.jit's cache key: a new value forces a new trace


def embed_in_micro_batches(embed: Callable, batch, micro_batch: int | None):
    """Computes `embed(batch)` for `micro_batch` rows at a time, without keeping activations for the gradient.

    The gradient of `sigmoid_loss(*embed_in_micro_batches(...), ...)` equals that of the loss of `embed(batch)`, in the
    memory of one micro-batch: the backward pass embeds every micro-batch again, given the gradient of the loss with
    respect to its embeddings. A task's loss function calls this; its training step does not change. Micro-batch m of M
    has the rows m, m + M, ...: if the batch is split over devices, each device embeds its own rows.

    Args:
      embed: a pure function of arrays [b, ...] that returns a tree of embeddings [b, ...], each row computed from its
        own row alone. Parameters that it closes over may be differentiated; the gradients of the micro-batches are
        summed in the parameters' dtype. Random keys must be part of the batch, as keys [B], so that the second pass
        draws the same numbers.
      batch: arrays [B, ...].
      micro_batch: rows embedded at a time over all devices, a divisor of B; None embeds all at once.

    Returns:
      What `embed(batch)` returns.

    Raises:
      UserError: `micro_batch` does not divide B.
    """
    embed = functools.partial(_call_retraced, embed)
    if micro_batch is None:
        return embed(batch)
    rows = jax.tree.leaves(batch)[0].shape[0]
    if micro_batch < 1 or rows % micro_batch:
        raise UserError(f"batch_size={rows} does not divide into embeddings of {micro_batch} rows: choose a divisor.")

    number = rows // micro_batch

    def part(index):
        """Returns micro-batch `index`: a slice along an axis that is not sharded, so that no rows are exchanged."""
        return jax.tree.map(
            lambda array: jax.lax.dynamic_index_in_dim(
                array.reshape(micro_batch, number, *array.shape[1:]), index, axis=1, keepdims=False
            ),
            batch,
        )

    def join(array):
        return jnp.swapaxes(array, 0, 1).reshape(rows, *array.shape[2:])

    # In a loop the recomputation cannot be merged with the first computation, so prevent_cse is not needed.
    embed_part = jax.checkpoint(lambda index: embed(part(index)), prevent_cse=False)
    return jax.tree.map(join, jax.lax.map(embed_part, jnp.arange(number)))


def _call_retraced(embed: Callable, rows):
    """Calls `embed(rows)`; a jitted function is traced again, since its trace holds the parameters it closed over."""
    function = embed
    while isinstance(function, functools.partial):
        function = function.func
    if not hasattr(function, "__wrapped__"):
        return embed(rows)
    with _TRACE_CONTEXT(object()):
        return embed(rows)
