"""Textbook versions of the losses: the specification of the fast ones, which tests compare with these.

`losses.sigmoid_loss` and `losses.softmax_loss` do not compute the matrix of all pairs at once, and
`losses.token_cross_entropy` and `losses.token_divergence` do not compute the logits of all tokens at once.
Axes: B images and their B texts; D width, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def sigmoid_loss(
    zimg: Float[Array, "B D"],
    ztxt: Float[Array, "B D"],
    log_scale: Float[Array, ""],
    bias: Float[Array, ""],
    text_ids: Int[Array, " B"] | None = None,
    image_ids: Int[Array, " B"] | None = None,
) -> Float[Array, ""]:
    """Returns the loss of algorithm 1 of Zhai et al. 2023, as in big_vision (trainers/proj/image_text/siglip.py).

    With `text_ids` or `image_ids`, equal texts and texts of equal images are not negatives.
    """
    logits = _products(zimg, ztxt) * jnp.exp(log_scale) + bias
    signs = -jnp.ones_like(logits) + 2 * jnp.eye(len(zimg))
    losses = -jax.nn.log_sigmoid(signs * logits)
    mask = _pair_mask(text_ids, image_ids)
    return (losses if mask is None else jnp.where(mask, losses, 0.0)).sum(axis=-1).mean()


def softmax_loss(
    zimg: Float[Array, "B D"],
    ztxt: Float[Array, "B D"],
    log_scale: Float[Array, ""],
    text_ids: Int[Array, " B"] | None = None,
    image_ids: Int[Array, " B"] | None = None,
) -> Float[Array, ""]:
    """Returns the mean of both cross entropies (Radford et al. 2021, figure 3); ids as in `sigmoid_loss`."""
    logits = _products(zimg, ztxt) * jnp.exp(log_scale)
    mask = _pair_mask(text_ids, image_ids)
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf)
    both = jnp.diag(jax.nn.log_softmax(logits, axis=1)) + jnp.diag(jax.nn.log_softmax(logits, axis=0))
    return -0.5 * both.mean()


def token_cross_entropy(
    hidden: Float[Array, "*batch D"],
    embedding: Float[Array, "V D"],
    targets: Int[Array, "*batch"],
    weights: Float[Array, "*batch"],
    softcap: float | None = None,
) -> Float[Array, ""]:
    """Returns the sum over tokens of `weight * -log softmax(logits)[target]`, in nats."""
    return -(weights * token_log_probs(hidden, embedding, targets, softcap)).sum()


def token_log_probs(
    hidden: Float[Array, "*batch D"],
    embedding: Float[Array, "V D"],
    targets: Int[Array, "*batch"],
    softcap: float | None = None,
) -> Float[Array, "*batch"]:
    """Returns the natural log-probability of every target."""
    log_probs = jax.nn.log_softmax(logits(hidden, embedding, softcap))
    return jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]


def token_divergence(
    hidden: Float[Array, "*batch D"],
    frozen: Float[Array, "*batch D"],
    embedding: Float[Array, "V D"],
    weights: Float[Array, "*batch"],
    temperature: float | Float[Array, ""] = 1.0,
    softcap: float | None = None,
) -> Float[Array, ""]:
    """Returns the sum over tokens of `weight * tau^2 * KL(frozen || tuned)` at temperature tau, in nats."""
    p, q = (jax.nn.log_softmax(logits(rows, embedding, softcap) / temperature) for rows in (frozen, hidden))
    return temperature**2 * (weights * (jnp.exp(p) * (p - q)).sum(-1)).sum()


def logits(
    hidden: Float[Array, "*batch D"], embedding: Float[Array, "V D"], softcap: float | None
) -> Float[Array, "*batch V"]:
    """Returns softcap * tanh(x / softcap) of x = hidden @ embedding.T, or x itself if softcap is None; float32."""
    x = jnp.einsum("...D,VD->...V", hidden.astype(jnp.float32), embedding.astype(jnp.float32))
    return x if softcap is None else softcap * jnp.tanh(x / softcap)


def _products(zimg: jax.Array, ztxt: jax.Array) -> jax.Array:
    return jnp.einsum("ID,TD->IT", zimg, ztxt, preferred_element_type=jnp.float32)


def _pair_mask(*ids: jax.Array | None) -> Bool[Array, "B B"] | None:
    """Returns the pairs that count: each image with its own text, and all whose ids differ; None for all pairs."""
    different = [each[:, None] != each[None] for each in ids if each is not None]
    if not different:
        return None
    return functools.reduce(jnp.logical_and, different) | jnp.eye(len(different[0]), dtype=bool)
