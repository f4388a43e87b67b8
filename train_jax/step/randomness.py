"""Random keys of a step: one for each row of the global batch, a function of (seed, step, row) alone."""

import jax
import jax.numpy as jnp

from train_jax.core.data_source import ROW

__all__ = ["ROW", "STEP", "numbered", "row_keys", "step_key"]

STEP = "step_number"  # key of a batch, see `numbered`


def step_key(seed: int, step: jax.Array) -> jax.Array:
    """Returns the key of a step, for randomness that all rows share."""
    return jax.random.fold_in(jax.random.key(seed), step)


def row_keys(seed: int, step: jax.Array, rows: int | jax.Array) -> jax.Array:
    """Returns one key for each row of the global batch: of all rows, [rows], or of an array of them, of any shape."""
    numbers = jnp.arange(rows) if isinstance(rows, int) else rows
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(step_key(seed, step), numbers.ravel())
    return keys.reshape(numbers.shape)


def numbered(batch: dict, step: jax.Array) -> dict:
    """Returns a batch [A, b, ...] with two more arrays [A, b]: each row's index in the global batch, and the step.

    A batch of packed examples holds their indices already.
    """
    if ROW not in batch:
        A, b = jax.tree.leaves(batch)[0].shape[:2]
        batch = batch | {ROW: jnp.arange(A * b).reshape(A, b)}
    return batch | {STEP: jnp.broadcast_to(step, batch[ROW].shape)}
