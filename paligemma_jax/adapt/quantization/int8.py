"""8-bit integers with one constant per output channel, and LLM.int8's product for evaluation (Dettmers et al. 2022)."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8

LARGEST = 127.0
SMALLEST = 1e-36  # rows with a smaller absmax become zeros, since 127 / absmax would overflow


@dataclasses.dataclass(frozen=True)
class Int8PerChannel:
    """A matrix [O, I] as `codes` int8 [O, I] and `channel_absmax` float32 [O]: codes * channel_absmax / 127."""

    @property
    def leaves(self) -> tuple[str, ...]:
        """Names of the arrays."""
        return ("codes", "channel_absmax")

    def encode(self, matrix: Float[Array, "O I"]) -> dict[str, Array]:
        """Returns the arrays of a float32 matrix."""
        absmax = jnp.abs(matrix).max(axis=-1)
        return {"codes": _codes(matrix, absmax), "channel_absmax": absmax}

    def decode(self, arrays: dict[str, Array], shape: tuple[int, int]) -> Float[Array, "O I"]:
        """Returns the float32 matrix of `shape`."""
        codes = arrays["codes"].reshape(shape).astype(jnp.float32)
        return codes * (arrays["channel_absmax"] / LARGEST)[:, None]


def split_product(arrays: dict[str, Array], x: Float[Array, "B *T I"], threshold: float) -> Float[Array, "B *T O"]:
    """Returns x W^T with the weights of `Int8PerChannel`: outlier columns in floating point, the others int8 x int8.

    A column of x that reaches the threshold anywhere in an example is multiplied in floating point with the dequantised
    weights. All other columns are rounded to int8, scaled by the largest magnitude below the threshold in their row,
    and multiplied with the weights' codes, summed exactly in int32. Both products use arrays of full shape with the
    other product's columns set to zero, so shapes do not depend on the data. bitsandbytes looks for outliers over the
    whole batch; here the result of an example does not depend on the rest of the batch.

    Args:
      arrays: from `Int8PerChannel.encode`.
      x: the inputs; rank 2 means one row per example.
      threshold: smallest magnitude of an outlier, 6.0 in the paper; infinity means no outliers.

    Returns:
      float32. For evaluation only, since rounding has no gradient.
    """
    codes, scale = arrays["codes"], arrays["channel_absmax"] / LARGEST
    values = x.astype(jnp.float32)
    is_outlier = jnp.abs(values) >= threshold
    absmax = jnp.where(is_outlier, 0.0, jnp.abs(values)).max(axis=-1)
    columns = is_outlier.any(axis=tuple(range(1, x.ndim - 1)), keepdims=True)
    rounded = jnp.where(columns, jnp.int8(0), _codes(values, absmax))
    int8_product = _times_transposed(rounded, codes, jnp.int32).astype(jnp.float32)
    scale = lax.expand_dims(scale, range(x.ndim - 1))
    outliers = jnp.where(columns, x, jnp.zeros((), x.dtype))
    outputs, inputs = codes.shape
    weights = Int8PerChannel().decode(arrays, (outputs, inputs)).astype(x.dtype)
    float_product = _times_transposed(outliers, weights, jnp.float32)
    return int8_product * (absmax / LARGEST)[..., None] * scale + float_product


@jax.jit
def _codes(values: Float[Array, "*R I"], absmax: Float[Array, "*R"]) -> Int8[Array, "*R I"]:
    """Returns each row in units of its absmax / 127, rounded half to even."""
    factor = jnp.where(absmax < SMALLEST, 0.0, LARGEST / absmax)[..., None]
    return jnp.clip(jnp.round(values * factor), -LARGEST, LARGEST).astype(jnp.int8)


def _times_transposed(x: Array, matrix: Array, dtype) -> Array:
    """Returns x [..., I] times the transpose of matrix [O, I], accumulated in `dtype`."""
    return lax.dot_general(x, matrix, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype)
