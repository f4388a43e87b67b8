"""Random keys of a step: one for each row of the global batch, a function of (seed, step, row) alone."""

import jax
import jax.numpy as jnp

ROW, STEP = "row_number", "step_number"  # keys of a batch, see `numbered`


def step_key(seed: int, step: jax.Array) -> jax.Array:
    """Returns the key of a step, for randomness that all rows share."""
    return jax.random.fold_in(jax.random.key(seed), step)


def row_keys(seed: int, step: jax.Array, rows: int) -> jax.Array:
    """Returns one key for each row of the global batch, [rows]."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(step_key(seed, step), jnp.arange(rows))


def numbered(batch: dict, step: jax.Array) -> dict:
    """Returns a batch [A, b, ...] with two more arrays [A, b]: each row's index in the global batch, and the step."""
    A, b = jax.tree.leaves(batch)[0].shape[:2]
    return batch | {ROW: jnp.arange(A * b).reshape(A, b), STEP: jnp.broadcast_to(step, (A, b))}
