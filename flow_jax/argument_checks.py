"""Checks of arguments: each raises UserError with the argument's name, its value and what was expected.

Values that are traced cannot be checked and pass.
"""

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from train_jax.core.errors import UserError


def is_traced(value: Any) -> bool:
    """Returns whether a value is a tracer, whose numbers are not known."""
    return isinstance(value, Tracer)


def check_function(name: str, value: Any) -> None:
    """Raises UserError unless the value can be called."""
    if not callable(value):
        raise UserError(f"{name} is {value!r}, expected a function or a module that can be called: pass one.")


def check_whole(name: str, value: Any, low: int | None = 1, high: int | None = None) -> None:
    """Raises UserError unless the value is a whole number from low to high; None is no limit."""
    try:
        number = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (low is not None and number < low) or (high is not None and number > high):
        limits = "" if low is None else f" of at least {low}" if high is None else f" from {low} to {high}"
        raise UserError(f"{name} is {value}, expected a whole number{limits}: change it.")


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, above: bool = False) -> None:
    """Raises UserError unless the value is a finite number from low to high; `above` excludes low itself."""
    if isinstance(value, Tracer) and not value.ndim:
        return
    try:
        number = math.nan if isinstance(value, str | bytes) or np.ndim(value) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or not low <= number <= high or (above and number == low):
        kind = "a finite number"
        if high < math.inf:
            kind += f" {'above' if above else 'from'} {low:g} {'and up ' if above else ''}to {high:g}"
        elif low > -math.inf:
            kind += f" above {low:g}" if above else f" of at least {low:g}"
        raise UserError(f"{name} is {value}, expected {kind}: change it.")


def check_key(name: str, value: Any) -> None:
    """Raises UserError unless the value is a key of jax.random, or an array of keys."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or not (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32):
        raise UserError(f"{name} is {value}, expected a key of random numbers: pass jax.random.key(0), for example.")


def check_numbers(name: str, value: Any) -> None:
    """Raises UserError unless the value can be converted to an array of numbers."""
    try:
        dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    except (TypeError, ValueError):  # a ragged list
        dtype = np.dtype(object)
    if not jnp.issubdtype(dtype, jnp.number) and not jnp.issubdtype(dtype, jnp.bool_):
        raise UserError(f"{name} is a {type(value).__name__} of {dtype}, expected an array of numbers: convert it.")
