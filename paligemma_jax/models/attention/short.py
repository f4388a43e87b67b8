"""Attention over short sequences on TPUs: the scores of a head are computed, used and forgotten on the chip.

All queries and keys of a head fit on the chip together, so this needs neither the blocks nor the running softmax of
flash attention (tpu.py), and no padding to whole blocks. The backward pass computes the scores again from q and k.
Arrays are [B, T, N * H], as products of matrices make them: with heads of 64 on the last axis, an array would fill half
of each vector register, and half of the memory that it takes.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

LONGEST = 256
"""Tokens. The scores of a head are then at most 256 KiB, of which the backward pass holds about five arrays."""
_LANES = 128
_HIDDEN = -2.3819763e38  # the score of a key that the mask hides, as in the plain kernel
_BLOCKS = 8 * 2**20  # bytes for blocks of heads, half of the memory that the smallest chip has beside its units
_ARRAYS = 7  # blocks of the backward pass: q, k, v, the cotangent, and three gradients


def short_attention(
    q: Float[Array, "B T D"],
    k: Float[Array, "B S D"],
    v: Float[Array, "B S D"],
    keys: Bool[Array, "B 1 S"] | None,
    *,
    head_dim: int,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B T D"]:
    """Returns attention of one device; arguments as of `dispatch.attention`.

    Args:
      q, k, v, scale: D = N * H; every query head has a key/value head of its own.
      keys: True on the keys that all queries of the row attend to; None on all.
      head_dim: H.
      interpret: run on a CPU, slowly.
    """
    return _attend((head_dim, scale, interpret), q, k, v, None if keys is None else keys.astype(jnp.float32))


_Static = tuple[int, float, bool]  # width of a head, scale, whether to interpret


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, q: Array, k: Array, v: Array, visible: Array | None) -> Array:
    """Returns attention; `visible` is 0.0 or 1.0."""
    (out,) = _call(_forward_kernel, static, (q, k, v), visible, results=(q,))
    return out


def _attend_forward(static: _Static, q: Array, k: Array, v: Array, visible: Array | None):
    return _attend(static, q, k, v, visible), (q, k, v, visible)


def _attend_backward(static: _Static, arguments: tuple, cotangent: Array):
    q, k, v, visible = arguments
    return *_call(_backward_kernel, static, (q, k, v, cotangent), visible, results=(q, k, v)), None


_attend.defvjp(_attend_forward, _attend_backward)


def _call(kernel: Any, static: _Static, arrays: tuple, visible: Array | None, results: tuple) -> tuple:
    """Calls a kernel for blocks of heads of `arrays`; returns arrays with the shapes of `results`."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    head_dim, scale, interpret = static
    rows, width = arrays[0].shape[0], arrays[0].shape[2]
    part = block_width(arrays[0].shape[1], width, head_dim, arrays[0].dtype) or width

    def block(array):
        return pl.BlockSpec((1, array.shape[1], part), lambda row, number: (row, 0, number))

    specs = [block(array) for array in arrays]
    if visible is not None:
        arrays = *arrays, visible
        specs.append(pl.BlockSpec((1, *visible.shape[1:]), lambda row, number: (row, 0, 0)))
    return pl.pallas_call(
        functools.partial(kernel, head_dim=head_dim, scale=scale, masked=visible is not None),
        out_shape=tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in results),
        grid=(rows, width // part),
        in_specs=specs,
        out_specs=tuple(block(array) for array in results),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
    )(*arrays)


def block_width(length: int, width: int, head_dim: int, dtype: DTypeLike) -> int | None:
    """Returns how many of the columns N * H a block has: as many as fit on the chip; None if no block fits.

    A block has whole heads and whole registers, or all columns. The chip holds the blocks of all arrays twice, as the
    next ones are read ahead.
    """
    whole = math.lcm(head_dim, _LANES)
    widths = [width, *(part for part in range(whole, width, whole) if width % part == 0)]
    column = 2 * _ARRAYS * -(-length // 16) * 16 * jnp.dtype(dtype).itemsize
    return max((part for part in widths if column * part <= _BLOCKS), default=None)


def _by_head(attend: Any, head_dim: int, inputs: tuple, outputs: tuple) -> None:
    """Writes `attend(*inputs) -> outputs` of each head; arguments are blocks [1, T, width]."""
    for start in range(0, inputs[0].shape[2], head_dim):
        head = slice(start, start + head_dim)
        for output, result in zip(outputs, attend(*(block[0, :, head] for block in inputs)), strict=True):
            output[0, :, head] = result.astype(output.dtype)


def _forward_kernel(q, k, v, *rest, head_dim: int, scale: float, masked: bool) -> None:
    visible, out = rest if masked else (None, *rest)

    def attend(q, k, v):
        return (_dot(_weights(q, k, visible, scale).astype(v.dtype), v, 1, 0),)

    _by_head(attend, head_dim, (q, k, v), (out,))


def _backward_kernel(q, k, v, d_out, *rest, head_dim: int, scale: float, masked: bool) -> None:
    visible, *gradients = rest if masked else (None, *rest)

    def attend(q, k, v, d_out):
        weights = _weights(q, k, visible, scale)
        d_weights = _dot(d_out, v, 1, 1)
        d_scores = weights * (d_weights - (weights * d_weights).sum(axis=1, keepdims=True))
        if visible is not None:
            d_scores = jnp.where(visible[0] > 0, d_scores, 0.0)
        d_scores = (d_scores * scale).astype(q.dtype)
        d_v = _dot(weights.astype(d_out.dtype), d_out, 0, 0)
        return _dot(d_scores, k, 1, 0), _dot(d_scores, q, 0, 0), d_v

    _by_head(attend, head_dim, (q, k, v, d_out), tuple(gradients))


def _weights(q: Array, k: Array, visible: Any, scale: float) -> Array:
    """Returns the softmax [T, S] of a head, float32."""
    scores = _dot(q, k, 1, 1) * scale
    if visible is not None:
        scores = jnp.where(visible[0] > 0, scores, _HIDDEN)
    exp = jnp.exp(scores - scores.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)


def _dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Contracts an axis of each of two matrices, accumulating in float32."""
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)
