"""Attention that computes all scores at once: the specification of the flash kernels."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from paligemma_jax.models.numerics import soft_cap


def plain_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B _ S"] | None,
    *,
    scale: float,
    cap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention with float32 scores and softmax; arguments as of `dispatch.attention`.

    A query without keys returns the mean of v.
    """
    B, T, N, H = q.shape
    K, S = k.shape[2], k.shape[1]
    G = N // K
    # Query heads that share keys become rows of one matrix: fewer and larger products, which are faster on CPU.
    q = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("BKQH,BKSH->BKQS", q, k, preferred_element_type=jnp.float32)
    scores = soft_cap(scores * scale, cap).reshape(B, K, G, T, S)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, -2.3819763e38)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(B, K, G * T, S)
    out = jnp.einsum("BKQS,BKSH->BKQH", weights, v)
    return out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
