"""Text generation: one prefill of image and prompt, then a `lax.while_loop` over a key/value cache, all in one jit.

The cache has one slot an input; every row writes its i-th new token to the same slot, whatever its prompt's length:

  slots       image patches | prompt, padded on either side | new tokens
  left pads     i  i  i  i  |   _    _   bos  how  many  \\n |  2  eos
  positions     0  1  2  3  |   .    .    4    5    6    7  |  8   9
  right pads    i  i  i  i  |  bos  how  many  \\n   _    _  |  2  eos
  positions     0  1  2  3  |   4    5    6    7    .    .  |  8   9

Positions count real tokens and pads are read by nobody, so the padding and the other rows of a batch change nothing.
Axes: B rows, P patches, T prompt tokens, S = P + T prompt slots, N new tokens, D width, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key

from paligemma_jax.generation.beam_search import beam_search
from paligemma_jax.generation.inputs import PAD, check_images, check_prompt, check_whole
from paligemma_jax.generation.token_sampling import Sampler, make_sampler, pick, row_keys
from paligemma_jax.models.paligemma import PaliGemma, join_masks, positions_of
from train_jax.core import row_sharding
from train_jax.core.errors import UserError

CACHE_DTYPES = (None, "float32", "bfloat16", "float16")


def generate(
    model: PaliGemma,
    images: ArrayLike | None,
    tokens: ArrayLike,
    mask_input: ArrayLike | None = None,
    max_new_tokens: int = 64,
    eos_id: int = 1,
    sampler: str = "greedy",
    seed: int = 0,
    *,
    first_row: int = 0,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int | None = None,
    length_penalty: float | None = None,
    image_features: ArrayLike | None = None,
    cache_dtype: str | None = None,
    return_out: bool = False,
) -> Int[Array, "B N"] | tuple[Int[Array, "B N"], dict[str, Any]]:
    """Continues every prompt. Compiles once for each set of shapes, sampler, top_k and num_beams.

    Args:
      model: a PaliGemma, with or without adapters.
      images: float [B, I, I, 3] prepared by the model's preprocessing ([-1, 1]); None with `image_features`.
      tokens: int [B, T], the text prompt alone: BOS, prefix, separator, padding on either side.
      mask_input: bool or int [B, T], true on real tokens; None means all are real. What stands on pads is ignored.
      max_new_tokens: N.
      eos_id: ends a row; -1 never does.
      sampler: which of these picks the next token, with the keywords it takes (`sampling.OPTIONS` has the defaults):
        "greedy", the likeliest;
        "temperature", a draw from softmax(logits / temperature); 0 equals greedy;
        "top_k", the same among the `top_k` likeliest words (and `temperature`);
        "nucleus", the same among the fewest words of mass `top_p` at that `temperature`;
        "beam", the best of `num_beams` hypotheses under `length_penalty` (beam_search.py has the rules).
      seed: of the draws. Row b draws with fold_in(key(seed), first_row + b), so it gets the same tokens whatever the
        other rows hold; the same prompt at another index draws others.
      first_row: number of row 0: where many prompts are answered in batches, how many came before.
      image_features: float [B, P, D] from `model.encode_image`, instead of images.
      cache_dtype: "float32", "bfloat16" or "float16"; the decoder's compute dtype when None.
      return_out: also return a dictionary of `steps`, the number of tokens decoded before all rows had ended, and
        `logits` float32 [B, N, V], which each token was picked from (0 where a step was not taken; as large as it
        looks), or for beams `score` float32 [B], sum of log p / length ** length_penalty.

    Returns:
      int32 [B, N]: the new tokens, EOS included, then 0; with `return_out`, a pair of these and the dictionary.

    Raises:
      UserError: an unknown sampler or option, or arguments whose shapes, types or values do not fit.
    """
    chosen = make_sampler(
        sampler, temperature=temperature, top_k=top_k, top_p=top_p, num_beams=num_beams, length_penalty=length_penalty
    )
    check_whole(max_new_tokens=max_new_tokens, eos_id=eos_id, seed=seed, first_row=first_row)
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}, expected at least 1: raise it.")
    vocab_size = model.config.decoder.vocab_size
    if not -1 <= eos_id < vocab_size:
        raise UserError(f"eos_id is {eos_id}, expected a word of the {vocab_size} that the model has, or -1 for none.")
    if cache_dtype not in CACHE_DTYPES:
        raise UserError(f"cache_dtype is {cache_dtype!r}, expected one of {CACHE_DTYPES}: choose one of these.")
    tokens, mask_input = check_prompt(model, tokens, mask_input)
    images, image_features = check_images(model, images, image_features, len(tokens))
    if first_row < 0:
        raise UserError(f"first_row is {first_row}, expected 0 or more, how many rows came before: change it.")
    key = jax.random.key(seed)
    new_tokens, out = _generate(
        model, images, image_features, tokens, mask_input, eos_id, chosen, key, first_row, max_new_tokens, cache_dtype,
        return_out,
    )  # fmt: skip
    return (new_tokens, out) if return_out else new_tokens


@functools.partial(jax.jit, static_argnames=("num_tokens", "cache_dtype", "keep_logits"))
def _generate(
    model: PaliGemma,
    images: Float[Array, "B I I 3"] | None,
    features: Float[Array, "B P D"] | None,
    tokens: Int[Array, "B T"],
    mask_input: Bool[Array, "B T"],
    eos_id: Int[Array, ""] | int,
    sampler: Sampler,
    key: Key[Array, ""],
    first_row: Int[Array, ""] | int,
    num_tokens: int,
    cache_dtype: str | None,
    keep_logits: bool,
) -> tuple[Int[Array, "B N"], dict[str, Array]]:
    if features is None:
        features, _ = model.encode_image(images)
    # Once, ahead of the loop over tokens, every step of which reads it twice.
    model.decoder.embed_tokens = row_sharding.gather(model.decoder.embed_tokens)
    logits, cache, valid = _prefill(model, features, tokens, mask_input, num_tokens, cache_dtype)
    if sampler.name == "beam":
        advance = functools.partial(_advance, model, jnp.repeat(valid, sampler.num_beams, axis=0))
        new_tokens, score, steps = beam_search(
            logits,
            cache,
            advance,
            num_beams=sampler.num_beams,
            num_tokens=num_tokens,
            prompt_slots=valid.shape[1],
            eos_id=eos_id,
            length_penalty=sampler.length_penalty,
        )
        return new_tokens, {"score": score, "steps": steps}
    advance = functools.partial(_advance, model, valid)
    pick_rows = row_sharding.by_rows(pick, (False, True, True, False), True)
    keys = row_keys(key, len(tokens), first_row)
    choose = lambda logits, step: pick_rows(sampler, logits, keys, step)  # noqa: E731
    return _decode(logits, cache, advance, choose, eos_id, num_tokens, keep_logits)


def _decode(logits: Float[Array, "B V"], cache, advance, choose, eos_id, num_tokens: int, keep_logits: bool):
    """Picks a token a row and a step until every row has ended; a token is fed to the model only if one follows it."""
    rows, vocab = logits.shape

    def store(step, logits, done, out):
        token = jnp.where(done, PAD, choose(logits, step))
        out = out | {"tokens": out["tokens"].at[:, step].set(token)}
        if keep_logits:
            out["logits"] = out["logits"].at[:, step].set(logits)
        return step + 1, token, done | (token == eos_id), out

    def body(carry):
        cache, step, token, done, out = carry
        logits, cache = advance(cache, token, step - 1)
        return cache, *store(step, logits, done, out)

    out = {"tokens": jnp.full((rows, num_tokens), PAD, jnp.int32)}
    if keep_logits:
        out["logits"] = jnp.zeros((rows, num_tokens, vocab), jnp.float32)
    first = store(jnp.zeros((), jnp.int32), logits, jnp.zeros((rows,), bool), out)
    _, steps, _, _, out = lax.while_loop(lambda c: (c[1] < num_tokens) & ~c[3].all(), body, (cache, *first))
    return out.pop("tokens"), out | {"steps": steps}


def _prefill(model: PaliGemma, features, tokens, mask_input, num_tokens: int, cache_dtype: str | None):
    """Reads image and prompt: logits [B, V] of the first new token, the cache, and which prompt slots are real."""
    features = model.context(features)
    valid, _ = join_masks(features.shape[1], mask_input, jnp.zeros(tokens.shape, jnp.int32))
    rows, prompt = valid.shape
    cache = model.decoder.empty_cache(rows, prompt + num_tokens, cache_dtype)
    mask = jnp.pad(valid[:, None, :] & valid[:, :, None], ((0, 0), (0, 0), (0, num_tokens)))
    x = jnp.concatenate([features.astype(jnp.float32), model.decoder.embed_tokens(tokens)], axis=1)
    hidden, cache, _ = model.decoder(x, positions_of(valid), mask, cache, 0)
    return model.decoder.logits(take_last(hidden, valid)[:, None])[:, 0], cache, valid


def _advance(model: PaliGemma, valid: Bool[Array, "B S"], cache, tokens: Int[Array, " B"], index: Int[Array, ""]):
    """Feeds new token number `index` of every row: logits [B, V] of the next one, and the cache."""
    prompt = valid.shape[1]
    slots = jnp.arange(cache["k"].shape[2])
    written = (slots >= prompt) & (slots <= prompt + index)
    mask = jnp.pad(valid, ((0, 0), (0, len(slots) - prompt))) | written[None, :]
    positions = valid.sum(axis=1, keepdims=True, dtype=jnp.int32) + index
    x = model.decoder.embed_tokens(tokens[:, None])
    hidden, cache, _ = model.decoder(x, positions, mask[:, None, :], cache, prompt + index)
    return model.decoder.logits(hidden)[:, 0], cache


def take_last(hidden: Float[Array, "B S D"], valid: Bool[Array, "B S"]) -> Float[Array, "B D"]:
    """The hidden state of every row's last real token."""
    last = valid.shape[1] - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
