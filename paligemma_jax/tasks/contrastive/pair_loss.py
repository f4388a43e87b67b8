"""The loss of all pairs of a batch's embeddings, and its metrics, as `config.loss` says."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Bool, Float
from ml_collections import ConfigDict

from paligemma_jax import losses
from paligemma_jax.losses import reference
from paligemma_jax.models.dual_encoder import DualEncoder
from train_jax.core.metrics import Metrics


def pair_loss(
    model: DualEncoder,
    zimg: Float[jax.Array, "B E"],
    ztxt: Float[jax.Array, "B E"],
    batch: Mapping[str, jax.Array],
    keys: jax.Array | None,
    settings: ConfigDict,
    mesh: Mesh,
) -> tuple[jax.Array, Metrics]:
    """Returns the mean loss of all pairs of embeddings, and metrics.

    Args:
      model: its scale and bias are used.
      zimg: embeddings of the images, of unit length.
      ztxt: embeddings of their texts, in the same order.
      batch: `text_id` and `image_id` [B], equal for equal texts and images, and perhaps `weight` [B], 0 for bad rows.
      keys: one for each row; used to draw negatives.
      settings: `config.loss`.
      mesh: the devices over which rows are split.
    """
    weight = batch.get("weight", jnp.ones(len(zimg)))
    metrics = _cosines(zimg, ztxt, weight) | {"scale": (jnp.exp(model.logit_scale[...]), jnp.float32(1.0))}
    ids = {"text_ids": batch["text_id"], "image_ids": batch["image_id"]} if settings.mask_duplicates else {}
    chunked: dict[str, Any] = {"mesh": mesh, "axis": ("data", "fsdp"), "chunk_size": settings.chunk_size}
    if "weight" in batch:
        chunked["valid"] = weight > 0
        metrics["good_rows"] = weight.sum(), jnp.float32(len(zimg))
    if settings.negatives is not None:
        chunked["mask"] = select_negatives(zimg, ztxt, settings.negatives, settings.negatives_by, keys)
    module, options = (reference, ids) if settings.full_matrix else (losses, ids | chunked)
    scale, bias = model.logit_scale[...], model.logit_bias
    if settings.name == "softmax":
        return module.softmax_loss(zimg, ztxt, scale, **options), metrics
    if bias is None:
        return module.sigmoid_loss(zimg, ztxt, scale, jnp.zeros(()), **options), metrics
    metrics["bias"] = bias[...], jnp.float32(1.0)
    return module.sigmoid_loss(zimg, ztxt, scale, bias[...], **options), metrics


def _cosines(zimg: jax.Array, ztxt: jax.Array, weight: jax.Array) -> Metrics:
    """Returns the mean cosine of an image with its own text, and with any text; a useful model separates the two."""
    rows = weight.sum()
    own = (zimg * ztxt).astype(jnp.float32).sum(axis=1) @ weight
    every = (weight @ zimg.astype(jnp.float32)) @ (weight @ ztxt.astype(jnp.float32))
    return {"cosine_own": (own, rows), "cosine_mean": (every / jnp.maximum(rows, 1.0), rows)}


def select_negatives(
    zimg: Float[jax.Array, "B D"], ztxt: Float[jax.Array, "B D"], number: int, by: str, keys: jax.Array | None
) -> Bool[jax.Array, "B B"]:
    """Returns a mask of the positives and of `number` negatives of each image (an ablation of Zhai et al. 2023).

    Args:
      zimg: embeddings of the images.
      ztxt: embeddings of their texts, in the same order.
      number: negatives of each image; more where several are equally hard.
      by: "random", "hard" (most similar) or "easy" (least similar).
      keys: one for each image; used by "random" alone.
    """
    if by == "random":
        scores = jax.vmap(lambda key: jax.random.uniform(key, (len(ztxt),)))(keys)
    else:
        cosines = jax.lax.stop_gradient(zimg @ ztxt.T)
        scores = cosines if by == "hard" else -cosines
    positive = jnp.eye(len(zimg), dtype=bool)
    scores = jnp.where(positive, -jnp.inf, scores)
    threshold = jax.lax.top_k(scores, number)[0][:, -1:]
    return positive | (scores >= threshold)
