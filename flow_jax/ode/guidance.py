"""Classifier-free guidance (Ho and Salimans 2022) within an interval of times (Kynkaanniemi et al. 2024)."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from flow_jax.argument_checks import check_function, check_number, check_numbers
from flow_jax.arrays import (
    AnyArray,
    BatchArray,
    CheckedLabels,
    CheckedTime,
    Number,
    Scalar,
    as_time,
    check_args,
    check_null,
    per_row,
    velocity_at,
)
from train_jax.core.errors import UserError


class Guided(nnx.Module):
    """The guided velocity v(null) + weight (v(label) - v(null)): a function (t, x, labels) for `sample`.

    Inside the interval a call evaluates the model on twice the rows. Outside it evaluates the model with its labels;
    this takes half the time if t is a scalar.
    """

    def __init__(
        self,
        model: Callable,
        weight: Scalar | AnyArray,
        null: int | float | tuple[int, ...],
        interval: tuple[Number, Number] = (0.0, 1.0),
    ):
        """Wraps a model (t, x, labels) -> velocity.

        Args:
          model: trained with dropped labels (losses.drop_labels).
          weight: 1 is the model itself, more is stronger guidance, 0 ignores the labels.
          null: the label, or the labels of a row, that mean "no label".
          interval: the times [low, high] at which guidance acts; (0, 1) is all of them.

        Raises:
          UserError: the model cannot be called, the interval is not two times in order, or the weight or null is not a
            number.
        """
        check_function("model", model)
        check_numbers("null", null)
        for label in np.ravel(null).tolist():
            check_number("null", label)
        check_numbers("the weight of guidance", weight)
        if jnp.ndim(weight):
            raise UserError(f"the weight of guidance has shape {list(jnp.shape(weight))}, expected one number.")
        check_number("the weight of guidance", weight)
        if not isinstance(interval, tuple | list) or len(interval) != 2:
            raise UserError(f"the interval of guidance is {interval!r}, expected two times, such as (0.0, 1.0).")
        low, high = interval
        for time in interval:
            check_number("a time of the interval of guidance", time)
        if not 0.0 <= low < high <= 1.0:
            raise UserError(f"the interval of guidance is {low:g} to {high:g}, expected 0 <= low < high <= 1.")
        self.model = model
        self.weight = weight
        self.null = null
        self.interval = (low, high)

    def __call__(self, t: CheckedTime, x: BatchArray, labels: CheckedLabels) -> Float[Array, "B ..."]:
        """Returns the guided velocity at (t, x)."""
        check_args((labels,), x)
        check_null(self.null, labels)
        t, (low, high) = as_time(t, x), self.interval
        inside = (t >= low) & (t <= high)

        def guided(t, x, labels):
            both = jnp.concatenate([labels, jnp.broadcast_to(jnp.asarray(self.null, labels.dtype), labels.shape)])
            times = t if t.ndim == 0 else jnp.concatenate([t, t])
            with_label, without = jnp.split(velocity_at(self.model, times, jnp.concatenate([x, x]), both), 2)
            return without + self.weight * (with_label - without)

        def plain(t, x, labels):
            return velocity_at(self.model, t, x, labels)

        if self.interval == (0.0, 1.0):
            return guided(t, x, labels)
        if t.ndim == 0:
            return lax.cond(inside, guided, plain, t, x, labels)
        return jnp.where(per_row(inside, x), guided(t, x, labels), plain(t, x, labels))
