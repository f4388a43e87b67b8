"""Attention: one function in front of the plain and the flash kernels, and one for the kernel of short sequences."""

import functools

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from paligemma_jax.models.attention import gpu, partition, short, tpu
from paligemma_jax.models.attention.masks import TokenMask
from paligemma_jax.models.attention.plain import plain_attention
from train_jax.core import devices

KERNELS = ("auto", "plain", "flash")
"""Values of `kernel`, and of the config key model.attention."""

SHORTEST = {"tpu": 512}
"""Length from which "auto" takes a flash kernel. Below, the compiler's fusions around plain attention are faster; on
platforms that are not here flash attention has not been measured."""


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B _ S"] | TokenMask | None,
    *,
    scale: float,
    cap: float | None = None,
    kernel: str = "plain",
) -> Float[Array, "B T N H"]:
    """Grouped-query attention with float32 scores and softmax.

    Args:
      q, k, v: in the compute dtype; N is a multiple of K, query head n uses key/value head n // (N / K).
      mask: True where query t attends to key s, or the same stored by token; None attends to all keys. [B, 1, S] holds
        for all queries. The output of a query without keys, as of padding, depends on the kernel.
      scale: factor on the scores, usually H ** -0.5.
      cap: soft cap on the scaled scores (Gemma 2), applied before the mask.
      kernel: one of KERNELS, see `has_flash`. A mask of every query and key is left to the plain kernel.

    Raises:
      ValueError: see `has_flash`.
    """
    (_, T, _, H), S = q.shape, k.shape[1]
    if (mask is None or isinstance(mask, TokenMask)) and T == S and has_flash(kernel, T, H, q.dtype, cap):
        return partition.on_each_device(_flash_kernel(scale, cap), q, k, v, mask)
    return plain_attention(q, k, v, mask.dense() if isinstance(mask, TokenMask) else mask, scale=scale, cap=cap)


def short_attention(
    q: Float[Array, "B T D"],
    k: Float[Array, "B T D"],
    v: Float[Array, "B T D"],
    mask: Bool[Array, "B 1 T"] | None,
    *,
    num_heads: int,
    scale: float,
) -> Float[Array, "B T D"]:
    """Attention of flattened heads, D = N * H, by the kernel for short sequences; requires `has_short`.

    Args:
      q, k, v, mask, scale: as of `attention`; every query head has a key/value head of its own.
      num_heads: N.
    """
    head_dim, interpret = q.shape[2] // num_heads, devices.platform() == "cpu"
    kernel = functools.partial(short.short_attention, head_dim=head_dim, scale=scale, interpret=interpret)
    return partition.on_each_device(kernel, q, k, v, mask, heads=(num_heads, num_heads))


def has_short(
    kernel: str, length: int, num_heads: int, head_dim: int, dtype: DTypeLike, mask: Bool[Array, "B _ S"] | None
) -> bool:
    """Returns whether self-attention without a soft cap uses the TPU's kernel for short sequences (short.py).

    Args:
      kernel, length, head_dim, dtype: see `has_flash`.
      num_heads: N, of queries and of keys.
      mask: as of `attention`; one of every query and key is left to the plain kernel.
    """
    fits = length <= short.LONGEST and jnp.dtype(dtype) == jnp.bfloat16 and (mask is None or mask.shape[1] == 1)
    return (
        kernel != "plain"
        and devices.platform() == "tpu"
        and fits
        and short.block_width(length, num_heads * head_dim, head_dim, dtype) is not None
        and not partition.is_partitioned_unseen()
    )


def has_flash(kernel: str, length: int, head_dim: int, dtype: DTypeLike, cap: float | None = None) -> bool:
    """Returns whether attention over `length` tokens uses a flash kernel, which holds no matrix of scores.

    Args:
      kernel: "plain"; "flash", on a CPU by an interpreter, for tests; or "auto", flash from the length of SHORTEST on
        if the platform has a kernel for these arrays (on TPUs, for bfloat16).
      length: T.
      head_dim: H.
      dtype: compute dtype.
      cap: see `attention`.

    Raises:
      ValueError: an unknown kernel, or "flash" where a GPU has none.
    """
    if kernel not in KERNELS:
        raise ValueError(f"the attention kernel is {kernel!r}, expected one of {', '.join(KERNELS)}.")
    if kernel == "plain":
        return False
    platform = devices.platform()
    fits = platform != "gpu" or gpu.fits_gpu(head_dim, dtype, cap)
    if kernel == "flash":
        if not fits:
            raise ValueError(
                f"the attention kernel is 'flash', but this GPU has none for heads of width {head_dim} in "
                f"{jnp.dtype(dtype)} with the soft cap {cap}, expected half precision, a multiple of 8 up to 256 (128 "
                "before Hopper) and no cap: set it to auto."
            )
        return True
    if platform == "tpu":
        fits = jnp.dtype(dtype) == jnp.bfloat16
    return fits and length >= SHORTEST.get(platform, length + 1) and not partition.is_partitioned_unseen()


def _flash_kernel(scale: float, cap: float | None):
    """Returns the platform's flash kernel, a function of q, k, v and a TokenMask or None."""
    if devices.platform() == "gpu":
        return functools.partial(gpu.gpu_attention, scale=scale)
    return functools.partial(tpu.tpu_attention, scale=scale, cap=cap, interpret=devices.platform() == "cpu")
