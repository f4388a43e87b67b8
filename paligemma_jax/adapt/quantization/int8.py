"""8-bit integers with one constant an output channel, and LLM.int8's product for evaluation (Dettmers et al. 2022)."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8

LARGEST = 127.0
SMALLEST = 1e-36  # a row below this is all zeros: 127 / absmax would overflow


@dataclasses.dataclass(frozen=True)
class Int8PerChannel:
    """A matrix [O, I] as `codes` int8 [O, I] and `channel_absmax` float32 [O]: codes * channel_absmax / 127."""

    @property
    def leaves(self) -> tuple[str, ...]:
        """Names of the arrays."""
        return ("codes", "channel_absmax")

    def encode(self, matrix: Float[Array, "O I"]) -> dict[str, Array]:
        """The arrays of a float32 matrix."""
        absmax = jnp.abs(matrix).max(axis=-1)
        return {"codes": _codes(matrix, absmax), "channel_absmax": absmax}

    def decode(self, arrays: dict[str, Array], shape: tuple[int, int]) -> Float[Array, "O I"]:
        """The float32 matrix of `shape`."""
        codes = arrays["codes"].reshape(shape).astype(jnp.float32)
        return codes * (arrays["channel_absmax"] / LARGEST)[:, None]


def split_product(arrays: dict[str, Array], x: Float[Array, "B *T I"], threshold: float) -> Float[Array, "B *T O"]:
    """x W^T with the weights of `Int8PerChannel`: most of it int8 x int8, outlier columns in floating point.

    A column of x that reaches the threshold anywhere in an example is multiplied as it is with the dequantised
    weights. All other columns are rounded to int8 by the largest magnitude below the threshold of their row, and
    multiplied with the weights' own codes, summed exactly in int32. Both products see arrays of full shape with the
    other's columns masked to zero, so shapes do not depend on the data. bitsandbytes looks for outliers over the whole
    batch; here an example's result does not depend on the others it is batched with.

    Args:
      arrays: from `Int8PerChannel.encode`.
      x: the inputs; rank 2 means one row an example.
      threshold: magnitude from which an input is an outlier, 6.0 in the paper; infinity has none.

    Returns:
      float32. Rounding has no gradient: for evaluation.
    """
    codes, scale = arrays["codes"], arrays["channel_absmax"] / LARGEST
    values = x.astype(jnp.float32)
    is_outlier = jnp.abs(values) >= threshold
    absmax = jnp.where(is_outlier, 0.0, jnp.abs(values)).max(axis=-1)
    columns = is_outlier.any(axis=tuple(range(1, x.ndim - 1)), keepdims=True)
    rounded = jnp.where(columns, jnp.int8(0), _codes(values, absmax))
    whole = _times_transposed(rounded, codes, jnp.int32).astype(jnp.float32)
    scale = lax.expand_dims(scale, range(x.ndim - 1))
    outliers = jnp.where(columns, x, jnp.zeros((), x.dtype))
    floating = _times_transposed(outliers, Int8PerChannel().decode(arrays, codes.shape).astype(x.dtype), jnp.float32)
    return whole * (absmax / LARGEST)[..., None] * scale + floating


@jax.jit
def _codes(values: Float[Array, "*R I"], absmax: Float[Array, "*R"]) -> Int8[Array, "*R I"]:
    """Each row in units of its absmax / 127, rounded half to even."""
    factor = jnp.where(absmax < SMALLEST, 0.0, LARGEST / absmax)[..., None]
    return jnp.clip(jnp.round(values * factor), -LARGEST, LARGEST).astype(jnp.int8)


def _times_transposed(x: Array, matrix: Array, dtype) -> Array:
    """x [..., I] times matrix [O, I] over I, accumulated in `dtype`."""
    return lax.dot_general(x, matrix, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype)
