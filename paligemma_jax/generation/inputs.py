"""What a user hands to generation and scoring, as arrays that fit the model, or a sentence that says what is wrong.

Values are looked at where they are at hand: not while tracing, nor where other processes hold a part of the array.
Axes: B rows, T prompt tokens, I image side, P patches, D width.
"""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from paligemma_jax.models.paligemma import PaliGemma
from train_jax.core.errors import UserError, quoted

PAD = 0


def check_prompt(
    model: PaliGemma, tokens: ArrayLike, mask_input: ArrayLike | None
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """Prompt tokens (0 on pads, whatever stood there) and their mask (all real when None is given).

    Raises:
      UserError: tokens that are no integers [B, T], a mask of another shape, a row without a real token, or an id that
        is no word of the model's.
    """
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise UserError(f"tokens are {tokens.dtype}{list(tokens.shape)}, expected integer ids [batch, length].")
    mask_input = jnp.ones(tokens.shape, bool) if mask_input is None else jnp.asarray(mask_input).astype(bool)
    if mask_input.shape != tokens.shape:
        raise UserError(
            f"mask_input has shape {list(mask_input.shape)} but tokens have {list(tokens.shape)}: "
            "give one entry a token."
        )
    if is_known(mask_input):
        empty = ~np.any(jax.device_get(mask_input), axis=1)
        if empty.any():
            raise UserError(
                f"row {int(np.argmax(empty))} of mask_input marks no real token, expected at least one (BOS) in every "
                "row: drop the row or give it a prompt."
            )
    return keep_words(model, tokens, mask_input, "tokens"), mask_input


def keep_words(model: PaliGemma, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], what: str) -> Int[Array, "B T"]:
    """Tokens as int32 with 0 where the mask is false.

    Raises:
      UserError: an id under the mask that is no word of the model's; embedding it would give NaN.
    """
    tokens, vocab_size = jnp.where(mask, tokens, PAD), model.config.decoder.vocab_size
    if is_known(tokens):
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
    """Images or image features, whichever is given, for `rows` rows of tokens; the other is None.

    Raises:
      UserError: both given or neither, a wrong shape, or pixels that are no floating point (and so not prepared).
    """
    if (images is None) == (features is None):
        found = "neither" if images is None else "both"
        raise UserError(f"{found} of images and image_features given, expected one of them: set the other to None.")
    vision, width = model.config.vision, model.config.decoder.width
    if features is None:
        expected = rows, vision.image_size, vision.image_size, 3
        advice = "prepare them with the model's preprocessing"
        return _floating(images, "images", expected, advice), None
    return None, _floating(features, "image_features", (rows, vision.num_patches, width), "take model.encode_image's")


def _floating(given: ArrayLike, name: str, shape: tuple[int, ...], advice: str) -> Array:
    array = jnp.asarray(given)
    if array.shape != shape or not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(
            f"{name} are {array.dtype}{list(array.shape)}, expected floating point {list(shape)} for this model and "
            f"{shape[0]} rows of tokens: {advice}."
        )
    return array


def check_whole(**values: Any) -> None:
    """Refuses what is no whole number, by its name. Raises UserError."""
    for name, value in values.items():
        try:
            operator.index(value)
        except TypeError:
            raise UserError(f"{name} is {quoted(value)}, expected a whole number: change it.") from None


def is_known(array: Array) -> bool:
    """Whether values can be looked at, see the top of this file."""
    return not isinstance(array, jax.core.Tracer) and array.is_fully_addressable
