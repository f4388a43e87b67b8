"""Flash attention on GPUs: cuDNN's, through jax.nn.dot_product_attention.

It has no soft cap, and a mask only as a bias of every query and key, which all heads share: memory is linear in T
without a mask, and with one a small part of that of the scores.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from paligemma_jax.models.attention.masks import TokenMask

IMPLEMENTATION = "cudnn"  # tests on a CPU set "xla"
_MULTIPLE = 8  # of the length, with a mask


def fits_gpu(head_dim: int, dtype: DTypeLike, cap: float | None) -> bool:
    """Returns whether cuDNN has attention of this kind, forward and backward, on the first GPU."""
    if cap is not None or jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16) or head_dim % 8:
        return False
    capability = float(getattr(jax.local_devices()[0], "compute_capability", "0"))
    return capability >= 8.0 and head_dim <= (256 if capability >= 9.0 else 128)


def gpu_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: TokenMask | None,
    *,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Returns attention of one device; arguments as of `dispatch.attention`."""
    if mask is None:
        return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation=IMPLEMENTATION)
    length = q.shape[1]
    extra = -length % _MULTIPLE
    q, k, v = (jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) for x in (q, k, v))
    visible = jnp.pad(mask.dense(), ((0, 0), (0, extra), (0, extra)))[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=visible, scale=scale, implementation=IMPLEMENTATION)[:, :length]
