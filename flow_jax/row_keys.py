"""Random keys of the rows of a batch, so that what a row draws does not depend on the other rows."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from flow_jax.argument_checks import check_key, check_numbers
from flow_jax.arrays import AnyArray, BatchArray, RandomKey
from train_jax.core.errors import UserError

RowKeys = Key[Array, " B"]
"""A typed key of jax.random for each row."""


def row_keys(key: RandomKey | RowKeys, rows: Int[AnyArray, " B"]) -> RowKeys:
    """Returns one key for each row.

    Args:
      key: one key, into which the number of each row is folded; or one key for each row, returned as it is.
      rows: numbers of the rows.
    """
    check_key("key", key)
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim:
        return key
    check_numbers("rows", rows)
    if np.ndim(rows) != 1:
        raise UserError(f"rows have shape {list(np.shape(rows))}, expected a list of numbers of rows: pass arange(n).")
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.asarray(rows))
    return keys if keys.ndim == 1 else jax.random.wrap_key_data(keys)


def stream(keys: RowKeys, number: int) -> RowKeys:
    """Returns the rows' keys for one of several purposes, by its number."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)


def normal_rows(keys: RowKeys, like: BatchArray) -> Float[Array, "B ..."]:
    """Draws standard normal rows of the shape and dtype of `like`."""
    return jax.vmap(lambda key: jax.random.normal(key, like.shape[1:], like.dtype))(keys)
