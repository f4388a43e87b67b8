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
    return merge(total, new)


def merge(first: Metrics, second: Metrics) -> Metrics:
    """Union of two sets of metrics; names on both sides are added."""
    merged = dict(first)
    for name, (value, count) in second.items():
        old_value, old_count = merged.get(name, (0.0, 0.0))
        merged[name] = (jnp.asarray(old_value + value, jnp.float32), jnp.asarray(old_count + count, jnp.float32))
    return merged


def means(metrics: Metrics) -> dict[str, float]:
    """Sum over count as Python floats; NaN where nothing was counted. One transfer from the device for all of them."""
    return {
        name: float(value) / float(count) if count != 0 else math.nan
        for name, (value, count) in jax.device_get(metrics).items()
    }


class MeanAccumulator:
    """Running means over a log interval or an evaluation: additions stay on the device, `means` reads them."""

    def __init__(self):
        self._total: Metrics = {}

    def add(self, metrics: Metrics) -> None:
        """Adds one step's metrics without waiting for the device; a name may appear later than others."""
        self._total = merge(self._total, metrics)

    def means(self) -> dict[str, float]:
        """The means so far; waits for the device."""
        return means(self._total)

    def reset(self) -> None:
        """Starts a new interval."""
        self._total = {}
