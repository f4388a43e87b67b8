"""Shapes shared by all of flow_jax.

Axes: B rows of a batch, `...` the axes of one example (any number: points [B, D], images [B, H, W, C]), K components
of a mixture or rows of a data set, N and M rows of two point clouds. Times are scalars or one a row, t = 0 noise and
t = 1 data. What annotations call an array may be a NumPy array: both are taken everywhere.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key, Num, UInt32

AnyArray = Array | np.ndarray
Rows = Float[AnyArray, "B ..."]
"""A batch of examples of any shape."""
Number = int | float | np.number
"""A plain number."""
Scalar = Number | Num[AnyArray, ""]
"""A number that may be traced."""
RandomKey = Key[Array, ""] | UInt32[Array, "2"]
"""A key of jax.random, typed or raw."""
Labels = Int[AnyArray, " B"] | Int[AnyArray, "B K"] | Float[AnyArray, "B E"]
"""What a model is told of each row: a class, several attributes, or a vector; see models.features.Condition."""
Time = Scalar | Float[AnyArray, " B"]
"""One time for all rows, or one a row."""


def as_time(t: Time, x: AnyArray) -> Array:
    """The time in the dtype of x, in float32 where that is no float: a scalar, or [B]."""
    dtype = jnp.result_type(x)
    return jnp.asarray(t, dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.float32)


def per_row(c: AnyArray, x: AnyArray) -> Array:
    """A coefficient, scalar or [B], with trailing axes of size 1 so that it multiplies x [B, ...]."""
    c = jnp.asarray(c)
    return c if c.ndim == 0 else lax.expand_dims(c, range(1, x.ndim))


def sum_rows(x: Array) -> Float[Array, " B"]:
    """Sums over the axes of an example."""
    return x.sum(axis=tuple(range(1, x.ndim)))


def mean_rows(x: Array) -> Float[Array, " B"]:
    """Means over the axes of an example."""
    return x.mean(axis=tuple(range(1, x.ndim)))


def flatten_rows(x: AnyArray) -> AnyArray:
    """[B, ...] as [B, D]; NumPy stays NumPy."""
    return x.reshape(len(x), -1)
