r"""Log-likelihood of given continuations (the answers of a multiple-choice question, say), in one forward pass.

The candidates follow the prompt one after another, do not attend to one another, and have the positions that each would
have alone. For example, two candidates, "red <eos>" and "a b <eos>" (M = 3), after two patches and a prompt of three
tokens; the last token of a candidate is only a target, so M - 1 tokens are inputs:

                   i i bos q \n  red <eos>  a b
  positions        0 1  2  3  4   5   6     5 6
  \n   attends to  1 1  1  1  1   0   0     0 0    predicts red, and a
  red  attends to  1 1  1  1  1   1   0     0 0    predicts <eos>
  a    attends to  1 1  1  1  1   0   0     1 0    predicts b
  b    attends to  1 1  1  1  1   0   0     1 1    predicts <eos>

Axes: B prompts, P patches, T prompt tokens, C candidates, M candidate tokens, D width, S = P + T prompt slots,
Q = S + C (M - 1) slots in all.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from paligemma_jax.generation.generate import last_real
from paligemma_jax.generation.inputs import check_images, check_prompt, check_token_ids, has_values
from paligemma_jax.losses import token_log_probs
from paligemma_jax.models.numerics import cast
from paligemma_jax.models.paligemma import PaliGemma, join_masks, positions_of
from train_jax.core.errors import UserError


def score_candidates(
    model: PaliGemma,
    image_features: ArrayLike,
    tokens: ArrayLike,
    mask_input: ArrayLike | None,
    candidates: ArrayLike,
    candidate_mask: ArrayLike,
    chunk_size: int = 256,
    vocab_chunk: int | None = None,
) -> Float[Array, "B C"]:
    """Returns the log-likelihood of each candidate after each prompt, in nats: the sum of log p over its tokens.

    Args:
      model: a PaliGemma, with or without adapters.
      image_features: float [B, P, D] from `model.encode_image`.
      tokens, mask_input: the prompts, as in `generate`.
      candidates: int [C, M], one continuation per row, with EOS if it should count, padded on the right.
      candidate_mask: bool or int [C, M], true on real tokens; the ids of padding are ignored.
      chunk_size, vocab_chunk: see `losses.token_cross_entropy`.

    Raises:
      UserError: arguments of a wrong shape, dtype or value.
    """
    tokens, mask_input = check_prompt(model, tokens, mask_input)
    candidates, candidate_mask = _check_candidates(model, candidates, candidate_mask)
    _, features = check_images(model, None, image_features, len(tokens))
    return _score(model, features, tokens, mask_input, candidates, candidate_mask, chunk_size, vocab_chunk)


@functools.partial(jax.jit, static_argnames=("chunk_size", "vocab_chunk"))
def _score(
    model: PaliGemma,
    features: Float[Array, "B P D"],
    tokens: Int[Array, "B T"],
    mask_input: Bool[Array, "B T"],
    candidates: Int[Array, "C M"],
    candidate_mask: Bool[Array, "C M"],
    chunk_size: int,
    vocab_chunk: int | None,
) -> Float[Array, "B C"]:
    rows, (count, length) = len(tokens), candidates.shape
    features = model.context(features)
    inputs = jnp.broadcast_to(candidates[:, :-1].reshape(-1), (rows, count * (length - 1)))
    valid, _ = join_masks(features.shape[1], mask_input, jnp.zeros(tokens.shape, jnp.int32))
    positions, mask = _positions_and_mask(valid, count, length - 1)
    hidden, _ = model.decode(features, jnp.concatenate([tokens, inputs], axis=1), positions, mask)

    of_prompt, of_inputs = jnp.split(hidden, [tokens.shape[1]], axis=1)
    first = jnp.broadcast_to(last_real(of_prompt, mask_input)[:, None, None], (rows, count, 1, hidden.shape[-1]))
    hidden = jnp.concatenate([first, of_inputs.reshape(rows, count, length - 1, hidden.shape[-1])], 2)  # [B, C, M, D]
    config = model.config.decoder
    log_probs = token_log_probs(
        cast(hidden, jnp.dtype(config.dtype)),
        model.decoder.embed_tokens.embedding[...].astype(config.dtype),
        jnp.broadcast_to(candidates, (rows, *candidates.shape)),
        chunk_size,
        vocab_chunk,
        config.final_softcap,
    )
    return jnp.where(candidate_mask[None], log_probs, 0.0).sum(axis=-1)


def _positions_and_mask(
    valid: Bool[Array, "B S"], count: int, length: int
) -> tuple[Int[Array, "B Q"], Bool[Array, "B Q Q"]]:
    """Returns positions and attention mask of `count` candidates of `length` tokens after a prompt, see the module."""
    rows, prompt = valid.shape
    candidate, offset = jnp.divmod(jnp.arange(count * length), max(length, 1))
    after_prompt = valid.sum(axis=1, keepdims=True, dtype=jnp.int32) + offset[None, :]
    own = (candidate[:, None] == candidate[None, :]) & (offset[:, None] >= offset[None, :])

    prompt_rows = jnp.pad(valid[:, None, :] & valid[:, :, None], ((0, 0), (0, 0), (0, count * length)))
    to_prompt = jnp.broadcast_to(valid[:, None, :], (rows, count * length, prompt))
    candidate_rows = jnp.concatenate([to_prompt, jnp.broadcast_to(own, (rows, *own.shape))], axis=2)
    positions = jnp.concatenate([positions_of(valid), after_prompt], axis=1)
    return positions, jnp.concatenate([prompt_rows, candidate_rows], axis=1)


def _check_candidates(model: PaliGemma, candidates: ArrayLike, mask: ArrayLike) -> tuple[Array, Array]:
    """Returns candidate tokens (0 on padding) and their mask, or raises a UserError."""
    candidates, mask = jnp.asarray(candidates), jnp.asarray(mask).astype(bool)
    if candidates.ndim != 2 or not jnp.issubdtype(candidates.dtype, jnp.integer) or mask.shape != candidates.shape:
        raise UserError(
            f"candidates are {candidates.dtype}{list(candidates.shape)} with a mask of {list(mask.shape)}, expected "
            "integer ids [candidates, length] and one mask entry an id."
        )
    if has_values(mask):
        real = jax.device_get(mask)
        wrong = ~real[:, :1].any(axis=1) | (np.diff(real.astype(int), axis=1) > 0).any(axis=1)
        if wrong.any():
            raise UserError(
                f"candidate {int(np.argmax(wrong))} is empty or padded before its end, expected at least one real "
                "token and padding on the right alone: move the padding."
            )
    return check_token_ids(model, candidates, mask, "candidates"), mask
