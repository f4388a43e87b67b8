"""Embeddings of a batch whose activations do not fit: gradient caching (Gao et al., 2021, arXiv:2101.06983)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from train_jax.core.errors import UserError

_TRACED_ANEW = jax.make_user_context(None)  # a new value: what jax.jit traced before is not used


def embed_in_micro_batches(embed: Callable, batch, micro_batch: int | None):
    """`embed(batch)`, computed for `micro_batch` rows at a time, without keeping activations for the gradient.

    A loss of all embeddings, `sigmoid_loss(*embed_in_micro_batches(...), ...)`, then has the gradient that the loss of
    `embed(batch)` has, for the memory of one micro-batch: the backward pass embeds every micro-batch once more, with
    the gradient of the loss with respect to its embeddings at hand. So a task's loss function calls this, and its step
    stays as it is.

    Args:
      embed: a pure function of arrays [b, ...] that returns embeddings [b, ...] (a tree of them), each row from its own
        row alone. What it closes over (parameters) may be differentiated; the gradients of the micro-batches add up
        in the type of the parameters. Random numbers must come from the batch, as keys [B], or the second pass would
        draw others.
      batch: arrays [B, ...].
      micro_batch: rows embedded at a time over all devices, a divisor of B; None: all at once, with activations.

    Micro-batch m of M takes the rows m, m + M, ...: of a batch split over devices, each device embeds its own.
    Raises UserError where `micro_batch` does not divide B.
    """
    embed = functools.partial(_as_it_is_now, embed)
    if micro_batch is None:
        return embed(batch)
    rows = jax.tree.leaves(batch)[0].shape[0]
    if micro_batch < 1 or rows % micro_batch:
        raise UserError(f"batch_size={rows} does not divide into embeddings of {micro_batch} rows: choose a divisor.")

    number = rows // micro_batch

    def part(index):
        """The micro-batch of a number: a slice along an axis that no device splits, so that nothing is copied first."""
        return jax.tree.map(
            lambda array: jax.lax.dynamic_index_in_dim(
                array.reshape(micro_batch, number, *array.shape[1:]), index, axis=1, keepdims=False
            ),
            batch,
        )

    def join(array):
        return jnp.swapaxes(array, 0, 1).reshape(rows, *array.shape[2:])

    # In a loop the recomputation cannot be merged with the first computation, so nothing has to prevent that.
    once_more = jax.checkpoint(lambda index: embed(part(index)), prevent_cse=False)
    return jax.tree.map(join, jax.lax.map(once_more, jnp.arange(number)))


def _as_it_is_now(embed: Callable, rows):
    """`embed(rows)`; what `jax.jit` or `jax.checkpoint` made would keep the parameters that it was traced with."""
    function = embed
    while isinstance(function, functools.partial):
        function = function.func
    if not hasattr(function, "__wrapped__"):
        return embed(rows)
    with _TRACED_ANEW(object()):
        return embed(rows)
