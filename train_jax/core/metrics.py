"""Metrics as sums and counts that stay on the device until somebody reads them.

A step or an evaluation batch returns `{name: (sum, count)}`, both float32 scalars: the sum of a quantity over the
examples (or tokens) that count, and how many those were. Means taken from added sums and counts are exact whatever the
batch size, the padding of the last batch (weight 0) or the number of devices; a mean of means is none of these.
"""

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Metrics = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]


def zeros_like(names: Iterable[str]) -> Metrics:
    """The neutral element of `add`, e.g. as a scan's first carry: sum 0 and count 0 of every name.

    `names` may be metrics, also abstract ones (`jax.eval_shape` of a step).
    """
    return {name: (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)) for name in names}


def add(total: Metrics, new: Metrics) -> Metrics:
    """Adds sums and counts name by name.

    Raises:
      ValueError: the two sides do not hold the same names, so that one of them would silently be averaged over less.
    """
    if total.keys() != new.keys():
        raise ValueError(f"metrics to add differ in their names: {sorted(total)} and {sorted(new)}")
    return {name: (total[name][0] + value, total[name][1] + count) for name, (value, count) in new.items()}


def means(metrics: Metrics) -> dict[str, float]:
    """Sum over count as Python floats; NaN where nothing was counted. One transfer from the device for all of them."""
    return {
        name: float(value) / float(count) if count != 0 else math.nan
        for name, (value, count) in jax.device_get(metrics).items()
    }
