"""Beam search over a decoder with a key/value cache, with the rules of transformers' `generate(num_beams=K)`.

A step extends the K open hypotheses of a row by every token and keeps the best 2 K extensions as candidates:
- a candidate that ends (in EOS, or because this is the last step) and ranks among the first K joins the row's K best
  closed hypotheses, ordered by score = sum of log p / length ** length_penalty, EOS counted in both;
- the best K candidates that do not end in EOS stay open.
A row is done when it has K closed hypotheses and none scores below the current score of the best open one. This is
transformers' default (`early_stopping=False`), a heuristic, since a longer hypothesis can have a better mean.

With K = 1 this is greedy decoding; with K at least the number of open hypotheses it is exhaustive search.

The beams of a row share its cache. Step i writes the K newest tokens to new slots i K to i K + K - 1, and a hypothesis
attends to the prompt and to the slots of its own tokens. These stay where they are when hypotheses branch or end: a
hypothesis only keeps the path of beams through which it came.

Axes: B rows, K beams, C = 2 K candidates, N new tokens, M = N K new slots, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from train_jax.core import row_sharding


class Hypotheses(NamedTuple):
    """K hypotheses per row, best first; unused slots have the score -inf."""

    tokens: Int[Array, "B K N"]  # 0 after the end
    scores: Float[Array, "B K"]  # sum of log p; of closed hypotheses, divided by length ** length_penalty


class _BeamState(NamedTuple):
    """The state of the search between steps."""

    open: Hypotheses
    closed: Hypotheses
    paths: Int[Array, "B K N"]  # the beam in whose slot each token of an open hypothesis is
    done: Bool[Array, " B"]  # whether the closed hypotheses are final


def beam_search(
    logits: Float[Array, "B V"],
    cache: dict[str, Array],
    advance: Callable,
    *,
    num_beams: int,
    num_tokens: int,
    eos_id: Int[Array, ""] | int,
    length_penalty: Float[Array, ""] | float,
) -> tuple[Int[Array, "B N"], Float[Array, " B"], Int[Array, ""]]:
    """Returns the best closed hypothesis of every row.

    Args:
      logits: float32 logits of the first new token.
      cache: what `advance` takes and returns: keys and values of the prompt, and room for M new slots.
      advance: (cache, tokens [B, K], their number i, new slots [B, K, M] that each attends to, number of earlier calls)
        -> (logits [B, K, V] of the next token, cache).
      num_beams: K.
      num_tokens: N.
      eos_id: id that ends a hypothesis, or -1 for none.
      length_penalty: exponent of the length; 0 ranks by the sum, 1 by the mean log-probability.

    Returns:
      Tokens with 0 after the end, their score, and the number of steps taken.
    """
    rows = logits.shape[0]
    empty = Hypotheses(
        jnp.zeros((rows, num_beams, num_tokens), jnp.int32), jnp.full((rows, num_beams), -jnp.inf, jnp.float32)
    )
    root = empty._replace(scores=empty.scores.at[:, 0].set(0.0))
    state = _BeamState(root, empty, jnp.zeros_like(empty.tokens), jnp.zeros((rows,), bool))
    extend = row_sharding.by_rows(_extend, (True, False, True, False, False), True)

    def body(carry):
        state, step, cache = carry
        newest = step - 1
        tokens = jnp.take(state.open.tokens, newest, axis=2)
        logits, cache = advance(cache, tokens, newest, _own_slots(state.paths, newest), newest)
        return extend(state, step, logits, eos_id, length_penalty), step + 1, cache

    logits = jnp.repeat(logits[:, None], num_beams, axis=1)
    state = extend(state, jnp.zeros((), jnp.int32), logits, eos_id, length_penalty)
    carry = state, jnp.ones((), jnp.int32), cache
    state, steps, _ = lax.while_loop(lambda c: (c[1] < num_tokens) & ~c[0].done.all(), body, carry)
    return state.closed.tokens[:, 0], state.closed.scores[:, 0], steps


def _extend(
    state: _BeamState, step: Int[Array, ""], logits: Float[Array, "B K V"], eos_id, length_penalty
) -> _BeamState:
    """Runs one step of every row, given the logits of token `step` of each open hypothesis."""
    rows, num_beams, vocab = logits.shape
    # The best of a row are among the best of each hypothesis, so no array of all totals is made. Of a matrix, the
    # compiler for TPUs finds the best without sorting it.
    matrix = logits.reshape(rows * num_beams, vocab)
    best, words = lax.top_k(matrix, min(2 * num_beams, vocab))
    log_probs = best - jax.nn.logsumexp(matrix, axis=-1, keepdims=True)
    totals = (state.open.scores.reshape(-1, 1) + log_probs).reshape(rows, -1)
    scores, index = lax.top_k(totals, 2 * num_beams)
    parents = index // words.shape[1]
    new_tokens = jnp.take_along_axis(words.reshape(rows, -1), index, axis=1).astype(jnp.int32)
    tokens = jnp.take_along_axis(state.open.tokens, parents[..., None], axis=1)
    candidates = Hypotheses(tokens.at[:, :, step].set(new_tokens), scores)  # [B, C]

    length = step + 1
    is_last = length == tokens.shape[-1]
    closes = ((new_tokens == eos_id) | is_last) & (jnp.arange(2 * num_beams) < num_beams)[None, :]
    normalizer = length.astype(jnp.float32) ** length_penalty
    ended = candidates._replace(scores=jnp.where(closes, scores / normalizer, -jnp.inf))
    closed, _ = _best(jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), state.closed, ended), num_beams)
    closed = jax.tree.map(lambda old, new: jnp.where(_expand_like(state.done, new), old, new), state.closed, closed)

    unfinished = candidates._replace(scores=jnp.where(new_tokens == eos_id, -jnp.inf, scores))
    still_open, indices = _best(unfinished, num_beams)
    done = state.done | (closed.scores[:, -1] >= still_open.scores[:, 0] / normalizer)
    parents = jnp.take_along_axis(parents, indices, axis=1)
    paths = jnp.take_along_axis(state.paths, parents[..., None], axis=1)
    paths = paths.at[:, :, step].set(jnp.arange(num_beams, dtype=jnp.int32)[None])
    return _BeamState(still_open, closed, paths, done)


def _best(hypotheses: Hypotheses, count: int) -> tuple[Hypotheses, Int[Array, "B K"]]:
    """Returns the `count` best hypotheses of every row and their indices, best first; ties keep their order."""
    scores, indices = lax.top_k(hypotheses.scores, count)
    return Hypotheses(jnp.take_along_axis(hypotheses.tokens, indices[..., None], axis=1), scores), indices


def _expand_like(row_flags: Bool[Array, " B"], array: Array) -> Bool[Array, "B ..."]:
    return row_flags.reshape(-1, *[1] * (array.ndim - 1))


def _own_slots(paths: Int[Array, "B K N"], newest: Int[Array, ""]) -> Bool[Array, "B K M"]:
    """Returns the new slots of every open hypothesis' tokens, up to token number `newest`."""
    rows, num_beams, num_tokens = paths.shape
    written = jnp.arange(num_tokens) <= newest
    own = jax.nn.one_hot(paths, num_beams, dtype=bool) & written[None, None, :, None]
    return own.reshape(rows, num_beams, -1)
