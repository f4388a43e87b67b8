"""Checks the inputs of generation and scoring and converts them to arrays.

Values are checked only where they are available: not while tracing, and not if other processes hold a part of the
array. Axes: B rows, T prompt tokens, I image side, P patches, D width.
"""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from paligemma_jax.models.paligemma import PaliGemma
from train_jax.core.errors import UserError, quoted

PAD = 0


def check_prompt(
    model: PaliGemma, tokens: ArrayLike, mask_input: ArrayLike | None
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """Returns prompt tokens, with 0 on padding, and their mask (all true if None is given).

    Raises:
      UserError: tokens that are not integers [B, T], a mask of another shape, a row without a real token, or an id
        outside the model's vocabulary.
    """
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise UserError(f"tokens are {tokens.dtype}{list(tokens.shape)}, expected integer ids [batch, length].")
    mask_input = jnp.ones(tokens.shape, bool) if mask_input is None else jnp.asarray(mask_input).astype(bool)
    if mask_input.shape != tokens.shape:
        raise UserError(
            f"mask_input has shape {list(mask_input.shape)} but tokens have {list(tokens.shape)}: "
            "give one entry per token."
        )
    if has_values(mask_input):
        empty = ~np.any(jax.device_get(mask_input), axis=1)
        if empty.any():
            raise UserError(
                f"row {int(np.argmax(empty))} of mask_input marks no real token, expected at least one (BOS) in every "
                "row: drop the row or give it a prompt."
            )
    return check_token_ids(model, tokens, mask_input, "tokens"), mask_input


def check_token_ids(
    model: PaliGemma, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], what: str
) -> Int[Array, "B T"]:
    """Returns tokens as int32, with 0 where the mask is false.

    Raises:
      UserError: a real token outside the model's vocabulary, whose embedding would be NaN.
    """
    tokens, vocab_size = jnp.where(mask, tokens, PAD), model.config.decoder.vocab_size
    if has_values(tokens):
        values = jax.device_get(tokens)
        wrong = values[(values < 0) | (values >= vocab_size)]
        if wrong.size:
            raise UserError(
                f"{what} hold the id {wrong[0]}, expected ids from 0 to {vocab_size - 1}: use this model's tokenizer."
            )
    return tokens.astype(jnp.int32)


def check_images(
    model: PaliGemma, images: ArrayLike | None, features: ArrayLike | None, rows: int
) -> tuple[Float[Array, "B I I 3"] | None, Float[Array, "B P D"] | None]:
    """Returns the images or the image features, whichever is given, for `rows` rows of tokens; the other is None.

    Raises:
      UserError: both given or neither, a wrong shape, or pixels that are not floating point (not preprocessed).
    """
    vision, width = model.config.vision, model.config.decoder.width
    if images is not None and features is None:
        expected = rows, vision.image_size, vision.image_size, 3
        return _floating(images, "images", expected, "prepare them with the model's preprocessing"), None
    if images is None and features is not None:
        expected = rows, vision.num_patches, width
        return None, _floating(features, "image_features", expected, "take model.encode_image's")
    given = "neither" if images is None else "both"
    raise UserError(f"{given} of images and image_features given, expected one of them: set the other to None.")


def _floating(values: ArrayLike, name: str, shape: tuple[int, ...], advice: str) -> Array:
    """Returns a floating-point array of `shape`, or raises UserError."""
    array = jnp.asarray(values)
    if array.shape != shape or not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(
            f"{name} are {array.dtype}{list(array.shape)}, expected floating point {list(shape)} for this model and "
            f"{shape[0]} rows of tokens: {advice}."
        )
    return array


def check_integers(**values: Any) -> None:
    """Raises UserError, with the argument's name, for a value that is not an integer."""
    for name, value in values.items():
        try:
            operator.index(value)
        except TypeError:
            raise UserError(f"{name} is {quoted(value)}, expected a whole number: change it.") from None


def has_values(array: Array) -> bool:
    """Returns whether the values of an array are available, see the module's docstring."""
    return not isinstance(array, Tracer) and array.is_fully_addressable
