"""Flash attention on TPUs: JAX's splash attention, with the mask's rows as data.

Splash attention has masks that are computed in the kernel from the index of a key and one integer per query. JAX makes
these integers when a kernel is built; here they are arrays of the batch: the last visible key of each query, and the
first one beside it where there is a sliding window. https://arxiv.org/abs/2205.14135 is the algorithm.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from paligemma_jax.models.attention.masks import TokenMask

LANES = 128
_LARGEST_BLOCK = 512
_ONE_BACKWARD = 1024  # up to this length, one kernel computes all gradients: it needs all keys of a head in one block
_FIRST_BITS = 15  # of the first visible key, below the last one in the same int32


def tpu_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: TokenMask | None,
    *,
    scale: float,
    cap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Returns attention in memory linear in T; arguments as of `dispatch.attention`.

    Args:
      q, k, v, scale, cap: of one device.
      mask: of one device; None attends to all keys.
      interpret: run on a CPU, slowly.
    """
    B, T = q.shape[:2]
    length, size = padded_length(T)
    visible, segment = _visible(mask, B, T, length)
    # The kernel has no scale. In bfloat16 it costs the queries a rounding unless it is a power of two.
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    q, k, v = (jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, length - T), (0, 0))) for x in (q, k, v))
    attend = functools.partial(
        _attend_one, size=size, cap=cap, windowed=mask is not None and mask.first is not None, interpret=interpret
    )
    out = jax.vmap(attend)(q, k, v, visible, segment)
    return out.transpose(0, 2, 1, 3)[:, :T]


def padded_length(length: int) -> tuple[int, int]:
    """Returns the length that sequences are padded to and the size of its blocks, a multiple of LANES that divides it.

    Of the sizes from half of the largest on, it takes the one with the least padding.
    """
    if length <= _LARGEST_BLOCK:
        padded = -(-length // LANES) * LANES
        return padded, padded
    sizes = range(_LARGEST_BLOCK, _LARGEST_BLOCK // 2 - 1, -LANES)
    return min(((-(-length // size) * size, size) for size in sizes), key=lambda pair: pair[0])


def _visible(
    mask: TokenMask | None, rows: int, length: int, padded: int
) -> tuple[Int[Array, "B S"] | None, Int[Array, "B S"] | None]:
    """Returns for each query an integer from which the kernel computes its visible keys, and the segments.

    Both have the padded length S, and are None where they would hide no key.
    """
    extra = (0, 0), (0, padded - length)
    if mask is None:
        # No query sees the keys of padding.
        return (None, None) if padded == length else (jnp.full((rows, padded), length - 1, jnp.int32), None)
    if mask.first is None:
        visible = mask.last
    else:
        assert padded < 1 << _FIRST_BITS
        visible = (mask.last << _FIRST_BITS) + mask.first
    # Queries of padding need a key, as the kernel divides by the sum of weights: they see the first one of padding.
    last = padded - 1 if mask.first is None else (padded - 1) << _FIRST_BITS
    return jnp.pad(visible, extra, constant_values=last), jnp.pad(mask.segment, extra)


def _attend_one(q, k, v, visible, segment, *, size: int, cap: float | None, windowed: bool, interpret: bool) -> Array:
    """Returns the attention of one example: q [N, T, H], k and v [K, T, H]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    length, one_head = q.shape[1], len(k) == 1
    once = length <= _ONE_BACKWARD
    blocks = splash.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=length if once else size,
        block_kv_dkv_compute=size,
        block_q_dq=None if once else size,
        block_kv_dq=None if once else size,
        use_fused_bwd_kernel=once,
    )
    rows = MaskInfo(data_next=None, mask_next=None, block_mask=None, partial_mask_blocks=None, q_sequence=visible)
    kernel = splash.SplashAttentionKernel(
        rows,
        None if once else rows,
        rows,
        block_sizes=blocks,
        is_mqa=one_head,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=cap,
        residual_checkpoint_name=None,
        mask_function=None if visible is None else _within if windowed else _up_to,
        interpret=interpret,
    )
    segments = None if segment is None else splash.SegmentIds(segment, segment)
    out = kernel(q, k[0] if one_head else k, v[0] if one_head else v, segments)
    assert isinstance(out, jax.Array)  # no residuals were asked for
    return out


def _up_to(last: Array, key: Array) -> Array:
    """Returns whether a query sees a key."""
    return key <= last


def _within(both: Array, key: Array) -> Array:
    """Returns whether a query sees a key, with a sliding window; `both` is its last and its first visible key."""
    first = both & ((1 << _FIRST_BITS) - 1)
    return (key <= both >> _FIRST_BITS) & (key >= first)
