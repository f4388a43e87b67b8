"""Attention: one function in front of the plain kernel and the kernels of TPUs and GPUs that hold no matrix of scores."""

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
    mask: Bool[Array, "B #T S"] | TokenMask | None,
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
      kernel: one of KERNELS, see `has_flash` and `has_short`. A mask of every query and key is left to the plain kernel.

    Raises:
      ValueError: see `has_flash`.
    """
    (_, T, N, H), (S, K) = q.shape, k.shape[1:3]
    by_key = mask is None or (not isinstance(mask, TokenMask) and mask.shape[1] == 1)
    if by_key and T == S and N == K and has_short(kernel, T, q.dtype, cap):
        return partition.on_each_device(functools.partial(short.short_attention, scale=scale), q, k, v, mask)
    if (mask is None or isinstance(mask, TokenMask)) and T == S and has_flash(kernel, T, H, q.dtype, cap):
        return partition.on_each_device(_flash_kernel(scale, cap), q, k, v, mask)
    return plain_attention(q, k, v, mask.dense() if isinstance(mask, TokenMask) else mask, scale=scale, cap=cap)


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


def has_short(kernel: str, length: int, dtype: DTypeLike, cap: float | None = None) -> bool:
    """Returns whether attention of as many keys as queries uses the TPU's kernel for short sequences (short.py).

    Args:
      kernel, dtype, cap: see `has_flash`.
      length: T.
    """
    fits = cap is None and length <= short.LONGEST and jnp.dtype(dtype) == jnp.bfloat16
    return kernel != "plain" and fits and devices.platform() == "tpu" and not partition.is_partitioned_unseen()


def _flash_kernel(scale: float, cap: float | None):
    """Returns the platform's flash kernel, a function of q, k, v and a TokenMask or None."""
    if devices.platform() == "gpu":
        return functools.partial(gpu.gpu_attention, scale=scale)
    return functools.partial(tpu.tpu_attention, scale=scale, cap=cap, interpret=devices.platform() == "cpu")
