"""Dynamic 8-bit data type of bitsandbytes: 256 levels over seven decades (Dettmers et al. 2022, 8-bit optimizers)."""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

DECADES = 7


@functools.lru_cache(maxsize=2)
def levels(signed: bool = True) -> Float[np.ndarray, "256"]:
    """Returns the 256 levels in [-1, 1] (signed) or [0, 1], ascending.

    Each decade has twice as many levels as the one below it, evenly spaced; 0 and 1 are levels too.
    """
    values = [0.0, 1.0]
    for decade in range(DECADES):
        edges = _linspace(2 ** (decade if signed else decade + 1) + 1)
        middles = np.float32(10.0 ** (decade - DECADES + 1)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values.extend(middles)
        if signed:
            values.extend(-middles)
    return np.sort(np.asarray(values, np.float32))


def _linspace(count: int) -> Float[np.ndarray, " count"]:
    """Returns `count` float32 numbers from 0.1 to 1 with the rounding of torch.linspace: steps from the nearer end."""
    start, end = np.float32(0.1), np.float32(1.0)
    step = np.float64((end - start) / np.float32(count - 1))
    index = np.arange(count)
    return np.where(index < count // 2, start + step * index, end - step * (count - 1 - index)).astype(np.float32)


def nearest_code(values: Float[Array, "*n"], signed: bool = True) -> UInt8[Array, "*n"]:
    """Returns the index of the nearest level of each value; ties go to the lower one."""
    table = levels(signed)
    return jnp.searchsorted((table[1:] + table[:-1]) / np.float32(2), values, side="left").astype(jnp.uint8)
