"""Greedy decoding with drafts from the text so far (Saxena 2023, prompt lookup decoding): the same tokens, fewer steps.

Each step looks up the newest token in the earlier text of its row, prompt and answer, and drafts the tokens that
followed its last occurrence. The model runs the newest token and D drafts in one pass, as one causal block. Its choices
are new tokens as long as the drafts before them are its choices too (Leviathan et al. 2023,
https://arxiv.org/abs/2211.17192), so that every step has at least the one new token of plain decoding:

  text so far   a small red cube , a
  inputs        a  small red    cube       the newest token, and what followed the last "a"
  choices       small red sphere ,         of the model
  new tokens    small red sphere           the draft "cube" is not its choice "sphere"

While a step's time is that of reading the weights, as for few rows, drafts cost little; in a batch on a CPU, whose time
grows with the rows, they cost more than they save. The tokens are those of plain decoding, except where two logits are
equal up to the rounding of a product with more rows.

Axes: B rows, T prompt tokens, N new tokens, D drafts, Q = 1 + D inputs of a row in a step, M = N Q new slots of the
cache, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from paligemma_jax.generation.inputs import PAD
from train_jax.core import row_sharding

NO_TOKEN = -1


class _Answers(NamedTuple):
    """The new tokens of all rows between steps."""

    tokens: Int[Array, "B N"]  # NO_TOKEN after the newest
    count: Int[Array, " B"]
    done: Bool[Array, " B"]
    logits: Float[Array, "B N V"] | None  # from which each token was chosen, if these are kept


def decode_with_drafts(
    logits: Float[Array, "B V"],
    prompt: Int[Array, "B T"],
    cache: dict[str, Array],
    advance: Callable,
    *,
    num_drafts: int,
    num_tokens: int,
    eos_id: Int[Array, ""] | int,
    keep_logits: bool,
) -> tuple[Int[Array, "B N"], dict[str, Array]]:
    """Decodes greedily until every row has ended.

    Args:
      logits: float32 logits of the first new token.
      prompt: the prompts' tokens, NO_TOKEN on padding.
      cache: what `advance` takes and returns: keys and values of the prompt, and room for M new slots.
      advance: (cache, tokens [B, Q], index of each among its row's new tokens, new slots [B, Q, M] that each attends
        to, number of earlier calls) -> (logits [B, Q, V] of the next tokens, cache).
      num_drafts: D.
      num_tokens: N.
      eos_id: id that ends a row, or -1 for none.
      keep_logits: whether to return the logits.

    Returns:
      Tokens with 0 after the end, and the dictionary of `generate`.
    """
    (rows, vocab), inputs = logits.shape, 1 + num_drafts
    slots, offsets = jnp.arange(num_tokens * inputs)[None, None], jnp.arange(inputs)[None]
    draft = row_sharding.by_rows(jax.vmap(functools.partial(_draft, num_drafts)), True, True)
    accept = row_sharding.by_rows(jax.vmap(_accept, in_axes=(0, 0, 0, None)), (True, True, True, False), True)

    def body(carry):
        cache, step, answers, real = carry
        drafts, start = draft(prompt, answers.tokens, answers.count), step * inputs
        newest = jnp.take_along_axis(answers.tokens, answers.count[:, None] - 1, axis=1)
        tokens = jnp.concatenate([newest, drafts], axis=1)
        block = (slots >= start) & (slots <= start + offsets[..., None])
        indices = answers.count[:, None] - 1 + offsets
        logits, cache = advance(cache, jnp.maximum(tokens, PAD), indices, real[:, None] | block, step)
        answers, kept = accept(answers, drafts, logits, eos_id)
        return cache, step + 1, answers, lax.dynamic_update_slice_in_dim(real, kept, start, axis=1)

    answers = _Answers(
        tokens=jnp.full((rows, num_tokens), NO_TOKEN, jnp.int32),
        count=jnp.zeros((rows,), jnp.int32),
        done=jnp.zeros((rows,), bool),
        logits=jnp.zeros((rows, num_tokens, vocab), jnp.float32) if keep_logits else None,
    )
    answers, _ = accept(answers, jnp.zeros((rows, 0), jnp.int32), logits[:, None], eos_id)
    real = jnp.zeros((rows, slots.size), bool)  # new slots that hold a token of the text
    carry = cache, jnp.zeros((), jnp.int32), answers, real
    _, steps, answers, _ = lax.while_loop(lambda c: ~c[2].done.all(), body, carry)
    out = {} if answers.logits is None else {"logits": answers.logits}
    return jnp.maximum(answers.tokens, PAD), out | {"steps": steps + 1}


def _draft(num_drafts: int, prompt: Int[Array, " T"], tokens: Int[Array, " N"], count: Int[Array, ""]):
    """Returns the D tokens of one row's text that followed the last earlier occurrence of its newest token.

    Without one, these are the first of the prompt; any draft is only a proposal. Behind the text they are NO_TOKEN.
    """
    text, newest = jnp.concatenate([prompt, tokens]), len(prompt) + count - 1
    at = jnp.arange(len(text))
    found = jnp.max(jnp.where((text == text[newest]) & (at < newest), at, -1))
    return jnp.take(text, found + 1 + jnp.arange(num_drafts), mode="fill", fill_value=NO_TOKEN)


def _accept(
    answer: _Answers, drafts: Int[Array, " D"], logits: Float[Array, "Q V"], eos_id: Int[Array, ""] | int
) -> tuple[_Answers, Bool[Array, " Q"]]:
    """Appends to one row's answer the model's choices up to the first that its draft is not.

    Args:
      answer: of one row.
      drafts: which followed the newest token as inputs.
      logits: of the token after each input.
      eos_id: ends the answer, as does its last token.

    Returns:
      The longer answer, and whether each input, the newest token and the drafts, is a token of the text.
    """
    num_tokens, choices = len(answer.tokens), jnp.argmax(logits, axis=-1).astype(jnp.int32)
    kept = jnp.pad(jnp.cumprod(drafts == choices[:-1]), (1, 0), constant_values=1).astype(bool)
    ends = choices == eos_id
    indices = answer.count + jnp.arange(len(choices))
    new = kept & (jnp.cumsum(ends) == ends) & (indices < num_tokens) & ~answer.done
    places = jnp.where(new, indices, num_tokens)  # the others are dropped
    tokens = answer.tokens.at[places].set(choices, mode="drop")
    kept_logits = None if answer.logits is None else answer.logits.at[places].set(logits, mode="drop")
    count = answer.count + new.sum(dtype=jnp.int32)
    done = answer.done | (new & ends).any() | (count == num_tokens)
    return _Answers(tokens, count, done, kept_logits), kept
