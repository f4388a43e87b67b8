"""The arithmetic of low-rank updates: W' = W + s A B (LoRA, Hu et al. 2021) and its rescaling (DoRA, Liu et al. 2024).

Kernels are [*in_shape, *out_shape], A is [*in_shape, r] and B [r, *out_shape], of one layer or, with a leading layer
axis on each, of a stack. Everything here is float32. Axes: see models.
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
    """s A B, shaped as the kernel.

    Args:
      a, b: the two factors, of any float dtype.
      scale: s, one number or one a layer.
      num_contracted: number of input axes.
    """
    stack, inputs = a.shape[: a.ndim - num_contracted - 1], a.shape[a.ndim - num_contracted - 1 : -1]
    outputs = b.shape[len(stack) + 1 :]
    a = a.astype(jnp.float32).reshape(*stack, math.prod(inputs), a.shape[-1])
    b = b.astype(jnp.float32).reshape(*stack, b.shape[len(stack)], math.prod(outputs))
    product = jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
    return (_trailing(scale, product) * product).reshape(*stack, *inputs, *outputs)


def column_norms(kernel: Float[Array, "..."], num_contracted: int, num_outputs: int) -> Float[Array, "..."]:
    """L2 norm over the input axes: one number an output channel (a row of torch's weight), and a layer if stacked."""
    stack = kernel.ndim - num_contracted - num_outputs
    return jnp.sqrt(jnp.square(kernel.astype(jnp.float32)).sum(tuple(range(stack, stack + num_contracted))))


def dora_gain(
    merged: Float[Array, "..."],
    magnitude: Float[Array, "..."],
    scale: float | Float[Array, ""] | Float[Array, " L"],
    num_contracted: int,
    num_outputs: int,
) -> Float[Array, "..."]:
    """DoRA's factor on every output channel, m / ||W + s A B||, shaped as the magnitude m.

    The norm is a constant to differentiation (Liu et al. 2024, section 4.3; peft does the same).

    Args:
      merged: W + s A B.
      magnitude: m, [*out_shape], with a leading layer axis if stacked.
      scale: s; layers of a stack where it is 0 have no adapter: their factor is 1, and m gets no gradient there.
      num_contracted, num_outputs: number of input and output axes.
    """
    norms = column_norms(lax.stop_gradient(merged), num_contracted, num_outputs)
    gain = magnitude.astype(jnp.float32) / jnp.where(norms == 0.0, 1.0, norms)
    return jnp.where(_trailing(scale, gain) == 0.0, 1.0, gain)


def _trailing(scale: float | Array, like: Array) -> Array:
    """A scale with axes of size 1 behind it, up to the rank of `like`."""
    scale = jnp.asarray(scale, jnp.float32)
    return lax.expand_dims(scale, range(scale.ndim, like.ndim))
