"""The loss of CoPrompt (Roy and Etemad 2024): class texts are told apart, and embeddings stay near those of the base.

  L = L_ce + lambda (L_text + L_image)
  L_ce     cross-entropy of exp(logit_scale) <image, class text> over the classes
  L_text   1 - mean cos(text tuned, on the prompt;      text frozen, on a richer description)
  L_image  1 - mean cos(image tuned, on the image;      image frozen, on another view of it)

so that L_text + L_image is the paper's 2 - cos - cos. Gradients flow to the tuned branch alone. Axes: B images, C
classes, N rows of either, E of an embedding, T tokens.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from paligemma_jax.models.dual_encoder import DualEncoder, unit
from train_jax.core.errors import UserError

KINDS = ("cosine", "l1", "mse")
SIDES = ("text", "image", "both")


def class_cross_entropy(
    logits: Float[Array, "B C"], labels: Int[Array, " B"], weights: Float[Array, " B"] | None = None
) -> Float[Array, ""]:
    """Mean of -log softmax(logits)[label] over rows.

    Args:
      logits: float32.
      labels: numbers of classes.
      weights: of the rows, 0 of those that do not count; None counts all. If all are 0, so is the loss.
    """
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), labels[:, None], axis=1)[:, 0]
    return -_mean(log_probs, weights)


def consistency_loss(
    tuned: Float[Array, "N E"],
    frozen: Float[Array, "N E"],
    kind: str = "cosine",
    weights: Float[Array, " N"] | None = None,
) -> Float[Array, ""]:
    """How far tuned embeddings are from frozen ones, which get no gradient.

    Args:
      tuned, frozen: of any length for "cosine", of unit length as a dual encoder returns them for the others.
      kind: "cosine" is 1 - mean cos; "l1" and "mse" are means over rows and entries of the difference, absolute or
        squared.
      weights: of the rows, as in `class_cross_entropy`.

    Raises:
      UserError: another kind.
    """
    frozen = lax.stop_gradient(frozen)
    if kind == "cosine":
        distance = 1.0 - jnp.sum(unit(tuned) * unit(frozen), axis=-1)
    elif kind in KINDS:
        difference = tuned - frozen
        distance = (jnp.abs(difference) if kind == "l1" else jnp.square(difference)).mean(axis=-1)
    else:
        raise UserError(f"the consistency is {kind!r}, expected one of {', '.join(KINDS)}: change it.")
    return _mean(distance, weights)


def coprompt_loss(
    model: DualEncoder,
    batch: Mapping[str, Array],
    weight: int | float = 0.0,
    kind: str = "cosine",
    on: str = "both",
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The loss of a batch, whatever the few-shot method; differentiate it by what trains.

    The frozen branch is the model itself without its prompts: no second copy of the weights, and as nothing in it
    trains, none of its activations are kept.

    Args:
      model: with prompts and adapters or without.
      batch: `images` [B, I, I, 3] as the model's preprocessing makes them, `labels` [B], and the class texts `tokens`
        [C, T]; `text_mask` [C, T] and the rows' `weights` [B] where there are any. With a weight also
        `images_augmented`, another view of the images, and `descriptions` [C, T] with `description_mask`, or
        `frozen_text` [C, E], embeddings of these by the base.
      weight: lambda; 0 leaves consistency out of the program.
      kind: see `consistency_loss`.
      on: "text", "image" or "both".

    Returns:
      The loss, and by name what it is made of: `ce`, `text` and `image` (those that are computed, before lambda),
      `logits` [B, C], and the tuned embeddings `image_embeds` and `text_embeds`.

    Raises:
      UserError: another kind or side.
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
    """The weighted mean of rows, 0 of none."""
    if weights is None:
        return values.mean()
    # A row that does not count may hold anything, infinities too.
    total = jnp.where(weights > 0, weights * values, 0.0).sum()
    return total / jnp.maximum(weights.sum(), jnp.finfo(jnp.float32).tiny)
