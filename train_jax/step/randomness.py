"""What is random in a step: a key for each row of the global batch, a function of (seed, step, row) alone."""

import jax
import jax.numpy as jnp

ROW, STEP = "row_number", "step_number"  # entries of a batch, see `numbered`


def step_key(seed: int, step: jax.Array) -> jax.Array:
    """The key of a step, for what all of its rows have in common."""
    return jax.random.fold_in(jax.random.key(seed), step)


def row_keys(seed: int, step: jax.Array, rows: int) -> jax.Array:
    """One key a row of the global batch."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(step_key(seed, step), jnp.arange(rows))


def numbered(batch: dict, step: jax.Array) -> dict:
    """A batch [A, b, ...] that also tells of each row which of the global batch it is, and of which step."""
    A, b = jax.tree.leaves(batch)[0].shape[:2]
    return batch | {ROW: jnp.arange(A * b).reshape(A, b), STEP: jnp.broadcast_to(step, (A, b))}
