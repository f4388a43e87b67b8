"""Array types and shape helpers shared by all of flow_jax.

Axes: B batch, `...` the axes of one example (any number: points [B, D], images [B, H, W, C]), K components of a mixture
or examples of a data set, N and M the sizes of two point clouds. Times are scalars or [B]; t = 0 is noise and t = 1 is
data. Every function accepts both JAX and NumPy arrays.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key, Num, UInt32

from flow_jax.argument_checks import check_number, check_numbers, check_whole
from flow_jax.callables import call_now
from train_jax.core.errors import UserError

AnyArray = Array | np.ndarray
ArrayT = TypeVar("ArrayT", Array, np.ndarray)
BatchArray = Float[AnyArray, "B ..."]
"""A batch of examples of any shape."""
CheckedBatch = Num[AnyArray, "..."]
"""A `BatchArray` whose shape the function checks itself: its error names both shapes. Integers become floats."""
Number = int | float | np.number
"""A Python or NumPy number."""
Scalar = Number | Num[AnyArray, ""]
"""A number, or an array without axes, which may be traced."""
RandomKey = Key[Array, ""] | UInt32[Array, "2"]
"""A key of jax.random, typed or raw."""
Labels = Int[AnyArray, " B"] | Int[AnyArray, "B K"] | Float[AnyArray, "B E"]
"""The condition of each example: a class, several attributes, or a vector; see models.layers.Condition."""
CheckedLabels = Int[AnyArray, "..."] | Float[AnyArray, "..."]
"""`Labels` whose number of rows the function checks itself."""
Time = Scalar | Float[AnyArray, " B"]
"""One time for the batch, or one for each row."""
CheckedTime = Scalar | Num[AnyArray, "..."]
"""A `Time` whose shape the function checks itself."""


def float_dtype(x: AnyArray):
    """Returns the dtype of x if that is a float type, else float32."""
    dtype = jnp.result_type(x) if hasattr(x, "dtype") else jnp.asarray(x).dtype  # x may be a list
    return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.dtype(jnp.float32)


def full_dtype(x: AnyArray):
    """Returns the dtype of x, at least float32: the precision of sums and squares."""
    return jnp.promote_types(float_dtype(x), jnp.float32)


def as_rows(name: str, x: CheckedBatch) -> Float[Array, "B ..."]:
    """Returns x as a JAX array of floats with a batch axis.

    Raises:
      UserError: x is a scalar or complex.
    """
    check_numbers(name, x)
    x = jnp.asarray(x)
    if x.ndim == 0 or jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise UserError(f"{name} is {x.dtype}{list(x.shape)}, expected rows of real numbers: give an array [B, ...].")
    return x.astype(float_dtype(x))


def same_rows(**rows: CheckedBatch) -> list[Float[Array, "B ..."]]:
    """Returns the arrays as `as_rows` does, after checking that they have one shape.

    Raises:
      UserError: shapes differ, be it by an axis of size 1, which NumPy would broadcast.
    """
    arrays = [as_rows(name, x) for name, x in rows.items()]
    for name, x in zip(rows, arrays, strict=True):
        check_shapes(next(iter(rows)), arrays[0], name, x)
    return arrays


def check_shapes(one: str, x: AnyArray, other: str, y: AnyArray) -> None:
    """Raises UserError, with both shapes, unless they are equal."""
    shapes = np.shape(x), np.shape(y)
    if shapes[0] != shapes[1]:
        raise UserError(
            f"{one} has shape {list(shapes[0])} and {other} {list(shapes[1])}, expected one shape: reshape one of them."
        )


def check_clouds(a: AnyArray, b: AnyArray) -> None:
    """Raises UserError if a cloud is empty, or if the rows of the two differ in shape; their numbers may differ."""
    for cloud in (a, b):
        check_numbers("a cloud", cloud)
    shapes = [np.shape(cloud) for cloud in (a, b)]
    if not all(shapes) or shapes[0][1:] != shapes[1][1:] or 0 in shapes[0] + shapes[1]:
        raise UserError(
            f"clouds of shapes {list(shapes[0])} and {list(shapes[1])} have no distance, expected rows of one shape, "
            "at least one in each: make them so."
        )


def check_args(args: tuple, x: AnyArray) -> None:
    """Raises UserError unless every array in `args` (labels, for example) has as many rows as x."""
    if not isinstance(args, tuple | list):
        raise UserError(f"args is a {type(args).__name__}, expected a tuple of arrays: write args=(labels,).")
    for leaf in jax.tree.leaves(args):
        if not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)):
            check_numbers("an array of args", leaf)
        if jnp.shape(leaf)[:1] != x.shape[:1]:
            raise UserError(
                f"args contain an array of shape {list(jnp.shape(leaf))} for x {list(x.shape)}, expected a row for "
                "every row of x: repeat it."
            )


def check_null(null: int | float | tuple, labels: AnyArray) -> None:
    """Raises UserError unless the null label has the shape of one row's label and fits the dtype of the labels."""
    check_numbers("null", null)
    if np.ndim(null) and np.shape(null) != labels.shape[1:]:
        raise UserError(f"null is {null} where a row's labels are {list(labels.shape[1:])}, expected one for each.")
    integers = jnp.issubdtype(labels.dtype, jnp.integer)
    for number in np.ravel(null).tolist():
        if integers:
            limits = jnp.iinfo(labels.dtype)
            whole = int(number) if isinstance(number, float) and number.is_integer() else number  # 9.0 is 9
            check_whole(f"null, of {labels.dtype} labels,", whole, int(limits.min), int(limits.max))
        else:
            check_number("null", number)


def velocity_at(velocity: Callable, t: Array, x: Array, *args) -> Array:
    """Evaluates a velocity at (t, x) and checks that it has x's shape.

    Raises:
      UserError: the shapes differ, be it by an axis of size 1; or the velocity is complex.
    """
    v = call_now(velocity, t, x, *args)
    if getattr(v, "shape", None) != x.shape or jnp.issubdtype(v.dtype, jnp.complexfloating):
        kind = f"{v.dtype}{list(v.shape)}" if hasattr(v, "dtype") else f"a {type(v).__name__}"
        raise UserError(
            f"the velocity is {kind} where x is {x.dtype}{list(x.shape)}, expected real numbers of x's shape: let it "
            "return a row for every row."
        )
    return v


def as_time(t: CheckedTime, x: AnyArray) -> Array:
    """Returns t as a scalar or [B], in the dtype of x, at least float32.

    Raises:
      UserError: t has another shape.
    """
    check_numbers("t", t)
    if isinstance(t, float | np.number):
        check_number("t", t)
    t = jnp.asarray(t, full_dtype(x))
    if t.ndim and t.shape != x.shape[:1]:
        raise UserError(
            f"t has shape {list(t.shape)} and x {list(x.shape)}, expected one time for all rows or one per row, "
            f"{list(x.shape[:1])}: reshape t."
        )
    return t


def per_row(c: AnyArray, x: AnyArray) -> Array:
    """Returns a coefficient, scalar or [B], with trailing axes of size 1 so that it multiplies x [B, ...]."""
    c = jnp.asarray(c)
    return c if c.ndim == 0 else lax.expand_dims(c, range(1, x.ndim))


def sum_rows(x: Array) -> Float[Array, " B"]:
    """Sums over all axes but the first."""
    return x.sum(axis=tuple(range(1, x.ndim)))


def squared_error(a: Array, b: Array) -> Float[Array, " B"]:
    """Returns the mean of |a - b|^2 over all axes but the first, in float32 at least."""
    gap = a.astype(full_dtype(a)) - b.astype(full_dtype(b))
    return (gap**2).mean(axis=tuple(range(1, gap.ndim)))


def flatten_rows(x: ArrayT) -> ArrayT:
    """Reshapes [B, ...] to [B, D]; a NumPy array stays one."""
    return x.reshape(len(x), math.prod(x.shape[1:]))
