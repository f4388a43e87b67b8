"""Attention over short sequences on TPUs: the scores of a head are computed, used and forgotten on the chip.

All queries and keys of a head fit on the chip together, so this needs neither the blocks nor the running softmax of flash
attention (tpu.py), and no padding to whole blocks. The backward pass computes the scores again from q and k.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

LONGEST = 256
"""Tokens. The scores of a head are then at most 256 KiB, of which the backward pass holds about five arrays."""
_HIDDEN = -2.3819763e38  # the score of a key that the mask hides, as in the plain kernel
_BLOCKS = 10 * 2**20  # bytes of the chip's memory for blocks of heads, of at least 16 MiB
_ARRAYS = 7  # blocks of the backward pass: q, k, v, the cotangent, and three gradients


def short_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    keys: Bool[Array, "B 1 S"] | None,
    *,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Returns attention of one device; arguments as of `dispatch.attention`.

    Args:
      q, k, v, scale: every query head has a key/value head of its own.
      keys: True on the keys that all queries of the row attend to; None on all.
      interpret: run on a CPU, slowly.
    """
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    visible = None if keys is None else keys.astype(jnp.float32)
    return _attend((scale, interpret), q, k, v, visible).transpose(0, 2, 1, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: tuple[float, bool], q: Array, k: Array, v: Array, visible: Array | None) -> Array:
    """Returns attention [B, N, T, H]; `static` is the scale and whether to interpret, `visible` is 0.0 or 1.0."""
    (out,) = _call(_forward_kernel, static, (q, k, v), visible, results=(q,))
    return out


def _attend_forward(static: tuple[float, bool], q: Array, k: Array, v: Array, visible: Array | None):
    return _attend(static, q, k, v, visible), (q, k, v, visible)


def _attend_backward(static: tuple[float, bool], arguments: tuple, cotangent: Array):
    q, k, v, visible = arguments
    return *_call(_backward_kernel, static, (q, k, v, cotangent), visible, results=(q, k, v)), None


_attend.defvjp(_attend_forward, _attend_backward)


def _call(kernel: Any, static: tuple[float, bool], arrays: tuple, visible: Array | None, results: tuple) -> tuple:
    """Calls a kernel for blocks of heads of `arrays` [B, N, T, H]; returns arrays with the shapes of `results`."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    scale, interpret = static
    rows, num_heads, *sizes = arrays[0].shape
    heads = _heads_at_once(num_heads, max(array.shape[2] for array in arrays), sizes[1], arrays[0].dtype.itemsize)

    def block(array):
        return pl.BlockSpec((1, heads, *array.shape[2:]), lambda row, part: (row, part, 0, 0))

    specs = [block(array) for array in arrays]
    if visible is not None:
        arrays = *arrays, visible
        specs.append(pl.BlockSpec((1, *visible.shape[1:]), lambda row, part: (row, 0, 0)))
    return pl.pallas_call(
        functools.partial(kernel, scale=scale, masked=visible is not None),
        out_shape=tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in results),
        grid=(rows, num_heads // heads),
        in_specs=specs,
        out_specs=tuple(block(array) for array in results),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
    )(*arrays)


def _heads_at_once(num_heads: int, length: int, head_dim: int, itemsize: int) -> int:
    """Returns how many heads a block has: as many as fit on the chip twice, since the next blocks are read ahead."""
    size = 2 * _ARRAYS * -(-length // 16) * 16 * -(-head_dim // 128) * 128 * itemsize
    return max(number for number in range(1, num_heads + 1) if num_heads % number == 0 and number * size <= _BLOCKS)


def _forward_kernel(q, k, v, *rest, scale: float, masked: bool) -> None:
    visible, out = rest if masked else (None, *rest)

    def attend(head, _):
        weights = _weights(q[0, head], k[0, head], visible, scale)
        out[0, head] = _dot(weights.astype(v.dtype), v[0, head], 1, 0).astype(out.dtype)

    lax.fori_loop(0, q.shape[1], attend, None)


def _backward_kernel(q, k, v, d_out, *rest, scale: float, masked: bool) -> None:
    visible, d_q, d_k, d_v = rest if masked else (None, *rest)

    def attend(head, _):
        weights = _weights(q[0, head], k[0, head], visible, scale)
        d_weights = _dot(d_out[0, head], v[0, head], 1, 1)
        d_scores = weights * (d_weights - (weights * d_weights).sum(axis=1, keepdims=True))
        if visible is not None:
            d_scores = jnp.where(visible[0] > 0, d_scores, 0.0)
        d_scores = (d_scores * scale).astype(q.dtype)
        d_q[0, head] = _dot(d_scores, k[0, head], 1, 0).astype(d_q.dtype)
        d_k[0, head] = _dot(d_scores, q[0, head], 0, 0).astype(d_k.dtype)
        d_v[0, head] = _dot(weights.astype(d_out.dtype), d_out[0, head], 0, 0).astype(d_v.dtype)

    lax.fori_loop(0, q.shape[1], attend, None)


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
