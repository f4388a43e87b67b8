r"""Text generation: one prefill of image and prompt, then a `lax.while_loop` over a key/value cache, in one jit.

The cache has one slot per input; every row writes its i-th input to the same slot, whatever its prompt's length:

  slots       image patches | prompt, padded on either side | new tokens
  left pads     i  i  i  i  |   _    _   bos  how  many  \n |  2  eos
  positions     0  1  2  3  |   .    .    4    5    6    7  |  8   9
  right pads    i  i  i  i  |  bos  how  many  \n   _    _  |  2  eos
  positions     0  1  2  3  |   4    5    6    7    .    .  |  8   9

Positions count real tokens and no token attends to padding, so neither padding nor the other rows of a batch affect the
result. Beams and drafts are several inputs of a row in one step (`TokenSampler.inputs`). They take as many slots, and
attend to the slots of the prompt, which they share, and of the new tokens before them; no slot is moved or copied.

Axes: B rows, P patches, T prompt tokens, S = P + T prompt slots, N new tokens, Q inputs of a row in a step, M = N Q new
slots, D width, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key

from paligemma_jax.generation.beam_search import beam_search
from paligemma_jax.generation.inputs import PAD, check_images, check_integers, check_prompt
from paligemma_jax.generation.layers_apart import take_apart
from paligemma_jax.generation.prompt_lookup import NO_TOKEN, decode_with_drafts
from paligemma_jax.generation.stacked_kernels import logits as decoder_logits
from paligemma_jax.generation.stacked_kernels import read_in_place
from paligemma_jax.generation.token_sampling import TokenSampler, make_sampler, row_keys, sample_tokens
from paligemma_jax.models.paligemma import PaliGemma, join_masks, positions_of
from train_jax.core import devices, row_sharding
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
    draft_tokens: int | None = None,
    image_features: ArrayLike | None = None,
    cache_dtype: str | None = None,
    return_out: bool = False,
) -> Int[Array, "B N"] | tuple[Int[Array, "B N"], dict[str, Any]]:
    """Generates a continuation of every prompt; compiles once for each set of shapes, sampler and whole-number options.

    Args:
      model: a PaliGemma, with or without adapters.
      images: float [B, I, I, 3] prepared by the model's preprocessing ([-1, 1]); None with `image_features`.
      tokens: int [B, T], the text prompt: BOS, prefix and separator, padded on either side.
      mask_input: bool or int [B, T], true on real tokens; None means all are real. The ids of padding are ignored.
      max_new_tokens: N.
      eos_id: id that ends a row, or -1 for none.
      sampler: how the next token is chosen (`token_sampling.OPTIONS` has the defaults of its keywords):
        "greedy", the most likely token; `draft_tokens` above 0 gives the same tokens in fewer steps where the text
          repeats itself, with 1 + draft_tokens slots of the cache for each new token (see prompt_lookup.py);
        "temperature", a sample from softmax(logits / temperature); 0 equals greedy;
        "top_k", a sample at `temperature` from the `top_k` most likely tokens;
        "nucleus", a sample at `temperature` from the smallest set of tokens of probability mass `top_p`;
        "beam", the best of `num_beams` hypotheses with `length_penalty` (see beam_search.py).
      seed: random seed. Row b uses fold_in(key(seed), first_row + b), so its tokens do not depend on the other rows of
        the batch; the same prompt in another row gets other samples.
      first_row: number of row 0; when many prompts are answered in batches, the number of earlier rows.
      image_features: float [B, P, D] from `model.encode_image`, instead of images.
      cache_dtype: "float32", "bfloat16" or "float16"; None means the decoder's compute dtype.
      return_out: whether to return also a dictionary of `steps`, the number of decoding steps until all rows had ended,
        and `logits` float32 [B, N, V] from which each token was chosen (0 for steps not taken; a large array), or for
        beam search `score` float32 [B], sum of log p / length ** length_penalty.

    Returns:
      int32 [B, N]: the new tokens, EOS included, then 0; with `return_out`, a pair of these and the dictionary.

    Raises:
      UserError: an unknown sampler or option, or arguments of a wrong shape, dtype or value.
    """
    token_sampler = make_sampler(
        sampler, temperature=temperature, top_k=top_k, top_p=top_p, num_beams=num_beams, length_penalty=length_penalty,
        draft_tokens=draft_tokens,
    )  # fmt: skip
    check_integers(max_new_tokens=max_new_tokens, eos_id=eos_id, seed=seed, first_row=first_row)
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}, expected at least 1: raise it.")
    vocab_size = model.config.decoder.vocab_size
    if not -1 <= eos_id < vocab_size:
        raise UserError(f"eos_id is {eos_id}, expected an id from 0 to {vocab_size - 1}, or -1 for none: change it.")
    if cache_dtype not in CACHE_DTYPES:
        raise UserError(f"cache_dtype is {cache_dtype!r}, expected one of {CACHE_DTYPES}: choose one of these.")
    tokens, mask_input = check_prompt(model, tokens, mask_input)
    images, image_features = check_images(model, images, image_features, len(tokens))
    if first_row < 0:
        raise UserError(f"first_row is {first_row}, expected 0 or more, the number of earlier rows: change it.")
    key = jax.random.key(seed)
    with devices.use_one_device((nnx.state(model), tokens)):
        new_tokens, out = _generate(
            model, images, image_features, tokens, mask_input, eos_id, token_sampler, key, first_row, max_new_tokens,
            cache_dtype, return_out,
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
    sampler: TokenSampler,
    key: Key[Array, ""],
    first_row: Int[Array, ""] | int,
    num_tokens: int,
    cache_dtype: str | None,
    keep_logits: bool,
) -> tuple[Int[Array, "B N"], dict[str, Array]]:
    if features is None:
        assert images is not None, "check_images lets exactly one of both through"
        features, _ = model.encode_image(images)
    # Gather the embedding once, before the loop over tokens, every step of which uses it twice.
    model.decoder.embed_tokens = row_sharding.gather_once(model.decoder.embed_tokens)
    read_in_place(model.decoder)
    logits, cache, valid = _prefill(model, features, tokens, mask_input, num_tokens * sampler.inputs, cache_dtype)
    take_apart(model.decoder, num_tokens)
    advance = functools.partial(_advance, model, valid)
    if sampler.name == "beam":
        new_tokens, score, steps = beam_search(
            logits,
            cache,
            advance,
            num_beams=sampler.num_beams,
            num_tokens=num_tokens,
            eos_id=eos_id,
            length_penalty=sampler.length_penalty,
        )
        return new_tokens, {"score": score, "steps": steps}
    if sampler.draft_tokens:
        return decode_with_drafts(
            logits,
            jnp.where(mask_input, tokens, NO_TOKEN),
            cache,
            advance,
            num_drafts=sampler.draft_tokens,
            num_tokens=num_tokens,
            eos_id=eos_id,
            keep_logits=keep_logits,
        )
    sample_rows = row_sharding.by_rows(sample_tokens, (False, True, True, False), True)
    keys = row_keys(key, len(tokens), first_row)
    sample = lambda logits, step: sample_rows(sampler, logits, keys, step)  # noqa: E731
    return _decode(logits, cache, advance, sample, eos_id, num_tokens, keep_logits)


def _decode(logits: Float[Array, "B V"], cache, advance, sample, eos_id, num_tokens: int, keep_logits: bool):
    """Samples one token per row and step until every row has ended; the model does not run on the last token."""
    (rows, vocab), slots = logits.shape, jnp.arange(num_tokens)

    def store(step, logits, done, out):
        token = jnp.where(done, PAD, sample(logits, step))
        out = out | {"tokens": out["tokens"].at[:, step].set(token)}
        if keep_logits:
            out["logits"] = out["logits"].at[:, step].set(logits)
        return step + 1, token, done | (token == eos_id), out

    def body(carry):
        cache, step, token, done, out = carry
        newest = step - 1
        logits, cache = advance(cache, token[:, None], newest, (slots <= newest)[None, None], newest)
        return cache, *store(step, logits[:, 0], done, out)

    out = {"tokens": jnp.full((rows, num_tokens), PAD, jnp.int32)}
    if keep_logits:
        out["logits"] = jnp.zeros((rows, num_tokens, vocab), jnp.float32)
    first = store(jnp.zeros((), jnp.int32), logits, jnp.zeros((rows,), bool), out)
    _, steps, _, _, out = lax.while_loop(lambda c: (c[1] < num_tokens) & ~c[3].all(), body, (cache, *first))
    return out.pop("tokens"), out | {"steps": steps}


def _prefill(
    model: PaliGemma, features, tokens, mask_input, new_slots: int, cache_dtype: str | None
) -> tuple[Array, dict[str, Array], Array]:
    """Runs image and prompt; returns logits [B, V] of the first new token, the cache, and the mask of prompt slots.

    The cache has `new_slots` more.
    """
    features = model.context(features)
    valid, _ = join_masks(features.shape[1], mask_input, jnp.zeros(tokens.shape, jnp.int32))
    rows, prompt = valid.shape
    cache = model.decoder.empty_cache(rows, prompt + new_slots, cache_dtype)
    mask = jnp.pad(valid[:, None, :] & valid[:, :, None], ((0, 0), (0, 0), (0, new_slots)))
    x = jnp.concatenate([features.astype(jnp.float32), model.decoder.embed_tokens(tokens)], axis=1)
    hidden, cache, _ = model.decoder(x, positions_of(valid), mask, cache, 0)
    assert cache is not None, "the decoder returns a cache when it is given one"
    return decoder_logits(model.decoder, last_real(hidden, valid)[:, None])[:, 0], cache, valid


def _advance(
    model: PaliGemma,
    valid: Bool[Array, "B S"],
    cache: dict[str, Array],
    tokens: Int[Array, "B Q"],
    numbers: Int[Array, ""] | Int[Array, "B Q"],
    seen: Bool[Array, "#B #Q M"],
    step: Int[Array, ""],
) -> tuple[Float[Array, "B Q V"], dict[str, Array]]:
    """Runs one step; returns logits of the token after each input, and the cache with the inputs written.

    Args:
      model: of the tokens.
      valid: prompt slots that hold a real token.
      cache: with S + M slots.
      tokens: the inputs.
      numbers: each input's index among the new tokens of its text.
      seen: the new slots that each input attends to, beside the prompt's.
      step: number of earlier steps; the inputs take the new slots from step * Q on.
    """
    parts = (jnp.broadcast_to(part, (*tokens.shape, part.shape[2])) for part in (valid[:, None], seen))
    positions = valid.sum(axis=1, keepdims=True, dtype=jnp.int32) + numbers
    positions = jnp.broadcast_to(positions, tokens.shape)
    mask, start = jnp.concatenate(list(parts), axis=2), valid.shape[1] + step * tokens.shape[1]
    hidden, written, _ = model.decoder(model.decoder.embed_tokens(tokens), positions, mask, cache, start)
    assert written is not None, "the decoder returns a cache when it is given one"
    return decoder_logits(model.decoder, hidden), written


def last_real(hidden: Float[Array, "B S D"], valid: Bool[Array, "B S"]) -> Float[Array, "B D"]:
    """Returns the hidden state of every row's last real token."""
    last = valid.shape[1] - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
