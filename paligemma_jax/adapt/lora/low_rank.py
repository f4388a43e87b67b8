"""The arithmetic of low-rank updates: W' = W + s A B (LoRA, Hu et al. 2021) and its rescaling (DoRA, Liu et al. 2024).

Kernels are [*in_shape, *out_shape], A is [*in_shape, r] and B [r, *out_shape], for one layer or, with a leading layer
axis on each, for a stack. Results are float32. Axes: see models.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def delta(
    a: Float[Array, "..."],
    b: Float[Array, "..."],
    scale: float | Float[Array, ""] | Float[Array, " L"],
    num_contracted: int,
) -> Float[Array, "..."]:
    """Returns s A B, in the shape of the kernel.

    Args:
      a, b: the two factors, of any float dtype.
      scale: s, one number or one per layer.
      num_contracted: number of input axes.
    """
    stack, inputs = a.shape[: a.ndim - num_contracted - 1], a.shape[a.ndim - num_contracted - 1 : -1]
    outputs = b.shape[len(stack) + 1 :]
    a = a.astype(jnp.float32).reshape(*stack, math.prod(inputs), a.shape[-1])
    b = b.astype(jnp.float32).reshape(*stack, b.shape[len(stack)], math.prod(outputs))
    product = jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
    return (_append_axes(scale, product) * product).reshape(*stack, *inputs, *outputs)


def column_norms(kernel: Float[Array, "..."], num_contracted: int, num_outputs: int) -> Float[Array, "..."]:
    """Returns the L2 norm over the input axes for every output channel (a row of torch's weight), and layer if stacked.

    Args:
      kernel: [in..., out...], with a leading layer axis if stacked.
      num_contracted, num_outputs: number of input and output axes.
    """
    stack = kernel.ndim - num_contracted - num_outputs
    return jnp.sqrt(jnp.square(kernel.astype(jnp.float32)).sum(tuple(range(stack, stack + num_contracted))))


def dora_gain(
    merged: Float[Array, "..."],
    magnitude: Float[Array, "..."],
    scale: float | Float[Array, ""] | Float[Array, " L"],
    num_contracted: int,
    num_outputs: int,
) -> Float[Array, "..."]:
    """Returns DoRA's factor on every output channel, m / ||W + s A B||, in the shape of the magnitude m.

    The norm is treated as a constant in differentiation (Liu et al. 2024, section 4.3; also in peft).

    Args:
      merged: W + s A B.
      magnitude: m, [*out_shape], with a leading layer axis if stacked.
      scale: s; layers of a stack with s = 0 have no adapter: their factor is 1, and their m gets no gradient.
      num_contracted, num_outputs: number of input and output axes.
    """
    norms = column_norms(lax.stop_gradient(merged), num_contracted, num_outputs)
    gain = magnitude.astype(jnp.float32) / jnp.where(norms == 0.0, 1.0, norms)
    return jnp.where(_append_axes(scale, gain) == 0.0, 1.0, gain)


def _append_axes(scale: float | Array, like: Array) -> Array:
    """Appends axes of size 1 to a scale, up to the rank of `like`."""
    scale = jnp.asarray(scale, jnp.float32)
    return lax.expand_dims(scale, range(scale.ndim, like.ndim))
