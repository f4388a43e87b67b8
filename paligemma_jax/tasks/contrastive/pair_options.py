"""The pairs that the loss of a batch counts, as `config.loss` says, and the metrics of the batch."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Bool, Float
from ml_collections import ConfigDict

from paligemma_jax.models.dual_encoder import DualEncoder
from train_jax.core.metrics import Metrics


def pair_options(
    zimg: Float[jax.Array, "B E"],
    ztxt: Float[jax.Array, "B E"],
    batch: Mapping[str, jax.Array],
    keys: jax.Array | None,
    settings: ConfigDict,
    mesh: Mesh,
) -> dict[str, Any]:
    """Returns the keyword arguments of `losses.sigmoid_loss` that say which pairs count and how they are computed.

    Args:
      zimg: embeddings of the images, of unit length.
      ztxt: embeddings of their texts, in the same order.
      batch: `text_id` and `image_id` [B], equal for equal texts and images, and perhaps `weight` [B], 0 for bad rows.
      keys: one for each row; used to draw negatives.
      settings: `config.loss`; with `full_matrix` the arguments are those of `losses.reference.sigmoid_loss`.
      mesh: the devices over which rows are split.
    """
    options = {"text_ids": batch["text_id"], "image_ids": batch["image_id"]} if settings.mask_duplicates else {}
    if settings.full_matrix:
        return options
    options |= {"mesh": mesh, "axis": ("data", "fsdp"), "chunk_size": settings.chunk_size}
    if "weight" in batch:
        options["valid"] = batch["weight"] > 0
    if settings.negatives is not None:
        options["mask"] = select_negatives(zimg, ztxt, settings.negatives, settings.negatives_by, keys)
    return options


def pair_metrics(
    model: DualEncoder, zimg: Float[jax.Array, "B E"], ztxt: Float[jax.Array, "B E"], batch: Mapping[str, jax.Array]
) -> Metrics:
    """Returns metrics: mean cosines, the model's scale and, if rows have weights, the share of good rows.

    Args:
      model: its scale is read.
      zimg: embeddings of the images, of unit length.
      ztxt: embeddings of their texts, in the same order.
      batch: perhaps has `weight` [B], 0 for bad rows.
    """
    metrics = _cosines(zimg, ztxt, batch.get("weight", jnp.ones(len(zimg))))
    metrics |= {"scale": (jnp.exp(model.logit_scale[...]), jnp.float32(1.0))}
    if "weight" in batch:
        metrics["good_rows"] = batch["weight"].sum(), jnp.float32(len(zimg))
    return metrics


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
