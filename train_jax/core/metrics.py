"""Metrics as sums and counts that stay on the device until they are read.

A step or an evaluation batch returns `{name: (sum, count)}`, both float32 scalars: the sum of a quantity over the valid
examples (or tokens), and their number. Means computed from added sums and counts are exact for any batch size, padding
of the last batch (weight 0) and number of devices; a mean of means is not.
"""

import math
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Metrics = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]


def row_count(batch: Mapping[str, Array], name: str) -> Float[Array, ""]:
    """Returns the sum of the row weights of a batch [A, b, ...], at least 1: a normalizer of losses summed over rows.

    Args:
      batch: has the row weights as `weight` [A, b], which are 0 for bad rows, or no such array.
      name: an array whose number of rows A * b is the result if there are no weights.
    """
    if "weight" in batch:
        return jnp.maximum(batch["weight"].sum(), 1.0)
    A, b = batch[name].shape[:2]
    return jnp.float32(A * b)


def zeros_like(names: Iterable[str]) -> Metrics:
    """Returns sum 0 and count 0 for every name, the neutral element of `add`.

    `names` may be metrics, including abstract ones (`jax.eval_shape` of a step).
    """
    return {name: (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)) for name in names}


def add(total: Metrics, new: Metrics) -> Metrics:
    """Adds sums and counts by name.

    Raises:
      ValueError: the names differ, which would silently leave examples out of a mean.
    """
    if total.keys() != new.keys():
        raise ValueError(f"metrics to add differ in their names: {sorted(total)} and {sorted(new)}")
    return {name: (total[name][0] + value, total[name][1] + count) for name, (value, count) in new.items()}


def means(metrics: Metrics) -> dict[str, float]:
    """Returns sum / count as Python floats, NaN for a count of 0; transfers all metrics from the device at once."""
    return {
        name: float(value) / float(count) if count != 0 else math.nan
        for name, (value, count) in jax.device_get(metrics).items()
    }
