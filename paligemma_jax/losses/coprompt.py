"""The loss of CoPrompt (Roy and Etemad 2024): cross entropy over class texts, and consistency with the frozen base.

  L = L_ce + lambda (L_text + L_image)
  L_ce     cross entropy of exp(logit_scale) <image, class text> over the classes
  L_text   1 - mean cos(tuned text embedding of the prompt,   frozen text embedding of a richer description)
  L_image  1 - mean cos(tuned embedding of the image,         frozen embedding of an augmented view)

so that L_text + L_image is the paper's 2 - cos - cos. Only the tuned branch gets gradients. Axes: B images, C classes,
N rows of either, E embedding width, T tokens.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from paligemma_jax.models.dual_encoder import DualEncoder, unit
from train_jax.core.errors import UserError

DISTANCES = ("cosine", "l1", "mse")
SIDES = ("text", "image", "both")


def class_cross_entropy(
    logits: Float[Array, "B C"], labels: Int[Array, " B"], weights: Float[Array, " B"] | None = None
) -> Float[Array, ""]:
    """Returns the weighted mean over rows of -log softmax(logits)[label], in nats.

    Args:
      logits: float32.
      labels: class indices.
      weights: weights of the rows, None for equal weights. If all are 0, the loss is 0.
    """
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), labels[:, None], axis=1)[:, 0]
    return -_mean(log_probs, weights)


def consistency_loss(
    tuned: Float[Array, "N E"],
    frozen: Float[Array, "N E"],
    kind: str = "cosine",
    weights: Float[Array, " N"] | None = None,
) -> Float[Array, ""]:
    """Returns the mean distance of tuned embeddings from frozen ones, which get no gradient.

    Args:
      tuned, frozen: embeddings of any length for "cosine", of unit length (as a dual encoder returns them) otherwise.
      kind: "cosine" is 1 - mean cos; "l1" and "mse" are the mean absolute and squared difference over rows and entries.
      weights: weights of the rows, as in `class_cross_entropy`.

    Raises:
      UserError: an unknown kind.
    """
    frozen = lax.stop_gradient(frozen)
    if kind == "cosine":
        distance = 1.0 - jnp.sum(unit(tuned) * unit(frozen), axis=-1)
    elif kind in DISTANCES:
        difference = tuned - frozen
        distance = (jnp.abs(difference) if kind == "l1" else jnp.square(difference)).mean(axis=-1)
    else:
        raise UserError(f"the consistency is {kind!r}, expected one of {', '.join(DISTANCES)}: change it.")
    return _mean(distance, weights)


def coprompt_loss(
    model: DualEncoder,
    batch: Mapping[str, Array],
    weight: int | float = 0.0,
    kind: str = "cosine",
    on: str = "both",
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Returns L of the module's docstring for a batch; with `weight=0` it is the loss of the other few-shot methods.

    Take its gradient with respect to the trainable parameters alone. The frozen branch is the same model without its
    prompts, so there is no second copy of the weights, and no activations are kept for it, since nothing of it trains.

    Args:
      model: with or without prompts and adapters.
      batch: `images` [B, I, I, 3] prepared by the model's preprocessing, `labels` [B], and the class texts `tokens`
        [C, T]; optionally `text_mask` [C, T] and row `weights` [B]. If `weight` is not 0, also `images_augmented`,
        another view of the images, and either `descriptions` [C, T] with `description_mask`, or `frozen_text` [C, E],
        their embeddings by the base.
      weight: lambda; 0 leaves the consistency terms out of the program.
      kind: see `consistency_loss`.
      on: the embeddings with a consistency term: "text", "image" or "both".

    Returns:
      The loss, and a dictionary of its terms `ce`, `text` and `image` (those that are computed, before lambda),
      `logits` [B, C], and the tuned embeddings `image_embeds` and `text_embeds`.

    Raises:
      UserError: an unknown value of `kind` or `on`.
    """
    if on not in SIDES:
        raise UserError(f"the consistency is on {on!r}, expected one of {', '.join(SIDES)}: change it.")
    rows = batch.get("weights")
    images, _ = model.encode_image(batch["images"])
    texts, _ = model.encode_text(batch["tokens"], batch.get("text_mask"))
    logits = model.logits(images, texts)
    parts = {"ce": class_cross_entropy(logits, batch["labels"], rows)}
    loss = parts["ce"]
    if weight and on != "image":
        frozen = batch.get("frozen_text")
        if frozen is None:
            frozen, _ = model.encode_text(batch["descriptions"], batch.get("description_mask"), prompts=False)
        parts["text"] = consistency_loss(texts, frozen, kind)
        loss = loss + weight * parts["text"]
    if weight and on != "text":
        frozen, _ = model.encode_image(batch["images_augmented"], prompts=False)
        parts["image"] = consistency_loss(images, frozen, kind, rows)
        loss = loss + weight * parts["image"]
    return loss, parts | {"logits": logits, "image_embeds": images, "text_embeds": texts}


def _mean(values: Float[Array, " N"], weights: Float[Array, " N"] | None) -> Float[Array, ""]:
    """Returns the weighted mean of rows; 0 if all weights are 0."""
    if weights is None:
        return values.mean()
    # A row of weight 0 may hold infinities or NaN.
    total = jnp.where(weights > 0, weights * values, 0.0).sum()
    return total / jnp.maximum(weights.sum(), jnp.finfo(jnp.float32).tiny)
