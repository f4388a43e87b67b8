"""Shapes shared by all of flow_jax.

Axes: B rows of a batch, `...` the axes of one example (any number: points [B, D], images [B, H, W, C]), K components
of a mixture or rows of a data set, N and M rows of two point clouds. Times are scalars or one a row, t = 0 noise and
t = 1 data. What annotations call an array may be a NumPy array: both are taken everywhere.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key, Num, UInt32

from flow_jax.argument_checks import check_number, check_numbers, check_whole
from flow_jax.callables import call_now
from train_jax.core.errors import UserError

AnyArray = Array | np.ndarray
Rows = Float[AnyArray, "B ..."]
"""A batch of examples of any shape."""
CheckedRows = Num[AnyArray, "..."]
"""As `Rows`, of a shape that others have too: where they differ, an error names both. Integers become floats."""
Number = int | float | np.number
"""A plain number."""
Scalar = Number | Num[AnyArray, ""]
"""A number that may be traced."""
RandomKey = Key[Array, ""] | UInt32[Array, "2"]
"""A key of jax.random, typed or raw."""
Labels = Int[AnyArray, " B"] | Int[AnyArray, "B K"] | Float[AnyArray, "B E"]
"""What a model is told of each row: a class, several attributes, or a vector; see models.layers.Condition."""
CheckedLabels = Int[AnyArray, "..."] | Float[AnyArray, "..."]
"""As `Labels`; of another number of rows than x, an error says so."""
Time = Scalar | Float[AnyArray, " B"]
"""One time for all rows, or one a row."""
CheckedTime = Scalar | Num[AnyArray, "..."]
"""As `Time`; of another shape, an error says so."""


def float_dtype(x: AnyArray):
    """The dtype of x, float32 where that is no float."""
    dtype = jnp.result_type(x) if hasattr(x, "dtype") else jnp.asarray(x).dtype  # lists are taken, too
    return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.dtype(jnp.float32)


def full_dtype(x: AnyArray):
    """The dtype of x, float32 where that is less: what sums and squares are taken in."""
    return jnp.promote_types(float_dtype(x), jnp.float32)


def as_rows(name: str, x: CheckedRows) -> Float[Array, "B ..."]:
    """An array of rows of floats.

    Raises:
      UserError: a single number, or complex ones.
    """
    check_numbers(name, x)
    x = jnp.asarray(x)
    if x.ndim == 0 or jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise UserError(f"{name} is {x.dtype}{list(x.shape)}, expected rows of real numbers: give an array [B, ...].")
    return x.astype(float_dtype(x))


def same_rows(**rows: CheckedRows) -> list[Float[Array, "B ..."]]:
    """Arrays of rows, all of one shape.

    Raises:
      UserError: shapes that differ, if only by an axis of size 1; they would be broadcast.
    """
    arrays = [as_rows(name, x) for name, x in rows.items()]
    for name, x in zip(rows, arrays, strict=True):
        check_shapes(next(iter(rows)), arrays[0], name, x)
    return arrays


def check_shapes(one: str, x: AnyArray, other: str, y: AnyArray) -> None:
    """Raises UserError, naming both shapes, unless they are equal."""
    shapes = np.shape(x), np.shape(y)
    if shapes[0] != shapes[1]:
        raise UserError(
            f"{one} has shape {list(shapes[0])} and {other} {list(shapes[1])}, expected one shape: reshape one of them."
        )


def check_clouds(a: AnyArray, b: AnyArray) -> None:
    """Raises UserError for clouds without rows, or whose rows are not of one shape; numbers of rows may differ."""
    for cloud in (a, b):
        check_numbers("a cloud", cloud)
    shapes = [np.shape(cloud) for cloud in (a, b)]
    if not all(shapes) or shapes[0][1:] != shapes[1][1:] or 0 in shapes[0] + shapes[1]:
        raise UserError(
            f"clouds of shapes {list(shapes[0])} and {list(shapes[1])} have no distance, expected rows of one shape, "
            "at least one in each: make them so."
        )


def check_args(args: tuple, x: AnyArray) -> None:
    """Raises UserError for what goes along with the rows of x, labels say, but does not have as many rows."""
    if not isinstance(args, tuple | list):
        raise UserError(f"args is a {type(args).__name__}, expected a tuple of arrays: write args=(labels,), say.")
    for leaf in jax.tree.leaves(args):
        if not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)):
            check_numbers("an array of args", leaf)
        if jnp.shape(leaf)[:1] != x.shape[:1]:
            raise UserError(
                f"args hold an array of shape {list(jnp.shape(leaf))} beside x {list(x.shape)}, expected a row for "
                "every row of x: repeat it."
            )


def check_null(null: int | float | tuple, labels: AnyArray) -> None:
    """Raises UserError for a label that stands for none and is not of a row's form, or that its dtype does not hold."""
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
    """What a velocity is at (t, x), once it is sure to be of x's shape.

    Raises:
      UserError: another shape, if only by an axis of size 1; or complex numbers.
    """
    v = call_now(velocity, t, x, *args)
    found = f"{v.dtype}{list(v.shape)}" if hasattr(v, "dtype") else f"a {type(v).__name__}"
    if getattr(v, "shape", None) != x.shape or jnp.issubdtype(v.dtype, jnp.complexfloating):
        raise UserError(
            f"the velocity is {found} where x is {x.dtype}{list(x.shape)}, expected real numbers of x's shape: let it "
            "return a row for every row."
        )
    return v


def as_time(t: CheckedTime, x: AnyArray) -> Array:
    """The time as a scalar or [B], in the dtype of x or in float32 where that is less.

    Raises:
      UserError: another shape.
    """
    check_numbers("t", t)
    if isinstance(t, float | np.number):
        check_number("t", t)
    t = jnp.asarray(t, full_dtype(x))
    if t.ndim and t.shape != x.shape[:1]:
        raise UserError(
            f"t has shape {list(t.shape)} and x {list(x.shape)}, expected one time for all rows or one a row, "
            f"{list(x.shape[:1])}: reshape t."
        )
    return t


def per_row(c: AnyArray, x: AnyArray) -> Array:
    """A coefficient, scalar or [B], with trailing axes of size 1 so that it multiplies x [B, ...]."""
    c = jnp.asarray(c)
    return c if c.ndim == 0 else lax.expand_dims(c, range(1, x.ndim))


def sum_rows(x: Array) -> Float[Array, " B"]:
    """Sums over the axes of an example."""
    return x.sum(axis=tuple(range(1, x.ndim)))


def squared_error(a: Array, b: Array) -> Float[Array, " B"]:
    """Means over the axes of an example of |a - b|^2, in float32 at least."""
    gap = a.astype(full_dtype(a)) - b.astype(full_dtype(b))
    return (gap**2).mean(axis=tuple(range(1, gap.ndim)))


def flatten_rows(x: AnyArray) -> AnyArray:
    """[B, ...] as [B, D]; NumPy stays NumPy."""
    return x.reshape(len(x), math.prod(x.shape[1:]))
